"""What can be seen from outside: metrics, the audit log, the operator's log."""
