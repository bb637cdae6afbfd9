"""A load generator for XKI and XKS: signed requests, checked answers, honest latencies.

target = Target("127.0.0.1", 8443, ca="server.crt")
workload = Workload("xki", "/demo", "demo-key", access_key_id, secret, host="127.0.0.1:8443")
result = await run_load(Plan(target, workload, connections=64, seconds=5), processes=2)
"""

from benchmarks.load.client import Target
from benchmarks.load.processes import run_load
from benchmarks.load.requests import Material, Workload
from benchmarks.load.results import LoadError, LoadResult
from benchmarks.load.run import Plan

__all__ = ["LoadError", "LoadResult", "Material", "Plan", "Target", "Workload", "run_load"]
