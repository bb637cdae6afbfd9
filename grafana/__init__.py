"""Dashboards and alerts: what somebody who is on call looks at. See docs/monitoring.md."""
