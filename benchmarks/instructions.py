"""The gate of the hot path: how many instructions its pure parts take, against a budget.

    python -m benchmarks.instructions            print the table; exit status 1 if a part is over
    python -m benchmarks.instructions --record   write what was counted as the new budget

Time wanders with the machine and its load; the number of instructions does not. They are counted by
valgrind, for each part of `benchmarks.parts` between two marks, as (count(2N) - count(N)) / N: what
does not belong to an iteration cancels out. Runs differ by far less than one percent.

How to read the table: `instructions` are those of one iteration. `ratio` is their multiple of the
part `reference`, a fixed piece of Python that no change of the project touches: it makes the
figures of different builds of Python comparable, and it is what has a budget. `change` is the ratio
against the budget. `whole-xki` and `whole-xks` go from the bytes of a request to those of its
answer, the others are parts of them, so that a table that fails says where.

Instructions are not time: a cache miss, a lock or a system call (its share of the kernel) is not
seen. `benchmarks.hot_path` and the load generator tell those.

When a part is over its budget: make it cheaper, or, where the work is worth it, record anew and
say in the commit why. When parts have become cheaper, record anew too: what was won is then kept.
A new library may also move them; `budget.json` says what it was recorded with.

Builds of Python differ more than the tolerance (other compilers, other optimizations), so that
`budget.json` has an entry for each build that was recorded; `--record` replaces or adds that of the
Python it runs in, and lets the others be. Any other build is held to the nearest entry, with a
wider tolerance. After a change of the hot path all of them are to be recorded anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import ssl
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.parts import COUNT, COUNTED, PARTS, PLANT, REFERENCE

BUDGET = Path(__file__).with_name("budget.json")
TOLERANCE = 0.03
OTHER_BUILD_TOLERANCE = 0.15
"""In a build of Python, or with libraries, that have no budget of their own."""

_LIBRARIES = ("aiohttp", "cryptography", "orjson", "prometheus-client")
_ROOT = Path(__file__).parent.parent
_TOTALS = re.compile(r"^totals: (\d+)$", re.MULTILINE)

_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    # OpenSSL's code for plain SSE, AES-NI and PCLMUL: the counts of all machines are the same.
    "OPENSSL_ia32cap": "~0x1000000000000000:0",
    # Memory comes from the system in one piece: how often it is asked for more, or given some
    # back, depends on the lengths of paths, and was worth one percent of a part.
    "GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000000000:glibc.malloc.top_pad=100000000",
}

_INHERITED = ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
"""No more than is needed: settings of Python, or of a memory allocator, would move the counts."""


class GateError(Exception):
    """The instructions could not be counted; the text says why."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What was recorded: a ratio for each part, and in which build of Python, with what."""

    build: str
    libraries: Mapping[str, str]
    ratios: Mapping[str, float]

    @property
    def tolerance(self) -> float:
        """How far a part may be over."""
        is_same = self.build == this_build() and self.libraries == _libraries()
        return TOLERANCE if is_same else OTHER_BUILD_TOLERANCE


def this_build() -> str:
    """What of this Python moves the counts: its version first, then how it was compiled.

    Of OpenSSL only the minor version: a security update must not take the build its budget.
    """
    options = str(sysconfig.get_config_var("CONFIG_ARGS"))
    flags = [flag for flag in ("--enable-optimizations", "--with-lto") if flag in options]
    openssl = "OpenSSL {}.{}".format(*ssl.OPENSSL_VERSION_INFO[:2])
    compiler = platform.python_compiler()
    return ", ".join([platform.python_version(), platform.machine(), compiler, *flags, openssl])


def _libraries() -> dict[str, str]:
    return {name: version(name) for name in _LIBRARIES}


# ---- counting -----------------------------------------------------------------------------------


def count(names: Sequence[str], planted: str = "") -> dict[str, float]:
    """Instructions of one iteration of each part, and of `reference`; two processes at a time.

    `planted` names a part that is made slower. Raises GateError.
    """
    wanted = [name for name in PARTS if name in names and name != REFERENCE]
    with ThreadPoolExecutor(2) as pool:
        groups = [[REFERENCE, *wanted[::2]], wanted[1::2]]
        found = pool.map(lambda group: _count_group(group, planted), filter(None, groups))
        return {name: cost for costs in found for name, cost in costs.items()}


def _count_group(names: Sequence[str], planted: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        _run(names, planted, Path(folder))
        # A mark writes what was counted since the mark before: 1 is the way to the first part.
        totals = [_total(Path(folder, f"out.{mark}")) for mark in range(1, 3 * len(names) + 1)]
    once, twice = totals[1::3], totals[2::3]
    return {name: (two - one) / COUNT for name, one, two in zip(names, once, twice, strict=True)}


def _run(names: Sequence[str], planted: str, folder: Path) -> None:
    counter = [
        "valgrind", "--tool=callgrind", "--instr-atstart=no", "--dump-before=getppid",
        f"--callgrind-out-file={folder / 'out'}",
    ]  # fmt: skip
    program = [sys.executable, "-m", "benchmarks.parts", *names]
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    environment = {**inherited, **_ENVIRONMENT, "PYTHONPATH": path, COUNTED: "1", PLANT: planted}
    try:
        done = subprocess.run(
            [*counter, *program], env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise GateError("valgrind is not installed (see tests/system-packages.sh)") from None
    if done.returncode != 0:
        raise GateError(f"{' '.join(program)} failed:\n{done.stderr}")


def _total(dump: Path) -> int:
    try:
        found = _TOTALS.search(dump.read_text())
    except FileNotFoundError:
        found = None
    if found is None:
        raise GateError("valgrind did not see the marks (calls of getppid)")
    return int(found[1])


# ---- the budget ---------------------------------------------------------------------------------


def read_budget() -> Budget:
    """That of this build, else of one of the same minor version, else the first; GateError."""
    budgets = _read_budgets()
    if not budgets:
        raise GateError("there is no budget yet: write one with --record")
    minor = platform.python_version().rpartition(".")[0] + "."
    return max(budgets, key=lambda b: (b.build == this_build(), b.build.startswith(minor)))


def _read_budgets() -> list[Budget]:
    return [Budget(**entry) for entry in json.loads(BUDGET.read_text())]


def record(counts: Mapping[str, float]) -> None:
    """Make what was counted the budget of this build."""
    ratios = {name: round(ratio, 4) for name, ratio in _ratios(counts).items()}
    budgets = {budget.build: budget for budget in _read_budgets()}
    budgets[this_build()] = Budget(this_build(), _libraries(), ratios)
    entries = [asdict(budgets[build]) for build in sorted(budgets)]
    BUDGET.write_text(json.dumps(entries, indent=2) + "\n")


def _ratios(counts: Mapping[str, float]) -> dict[str, float]:
    """In the order of the parts."""
    reference = counts[REFERENCE]
    return {name: counts[name] / reference for name in PARTS if name in counts}


def judge(counts: Mapping[str, float], budget: Budget) -> tuple[bool, str]:
    """Whether all parts keep within the budget, and the table that shows it."""
    heading = f"{'part':<20}{'instructions':>13}{'ratio':>9}{'budget':>9}{'change':>9}"
    lines, over, under = [heading], False, False
    for name, ratio in _ratios(counts).items():
        allowed = budget.ratios.get(name)
        line = f"{name:<20}{counts[name]:13,.0f}{ratio:9.3f}"
        if allowed is None:
            over = True
            lines.append(f"{line}        -  NOT RECORDED")
            continue
        change = ratio / allowed - 1
        over |= change > budget.tolerance
        under |= change < -TOLERANCE
        mark = "  OVER" if change > budget.tolerance else ""
        lines.append(f"{line}{allowed:9.3f}{change:+9.1%}{mark}")
    return not over, "\n".join([*lines, *_remarks(budget, over, under)])


def _remarks(budget: Budget, over: bool, under: bool) -> list[str]:
    remarks = []
    if budget.build != this_build():
        remarks += [
            f"this Python has no budget of its own: {this_build()}",
            f"taken instead: {budget.build}",
        ]
    remarks += [
        f"recorded with {name} {budget.libraries.get(name)}, this is {found}"
        for name, found in _libraries().items()
        if found != budget.libraries.get(name)
    ]
    if budget.tolerance != TOLERANCE:
        remarks.append(
            f"the tolerance is therefore {budget.tolerance:.0%} instead of {TOLERANCE:.0%}"
        )
    if over:
        remarks.append(f"over the budget by more than {budget.tolerance:.0%}")
    elif under and budget.build == this_build():
        remarks.append("some parts have become cheaper: keep it, with --record")
    return remarks


def main() -> int:
    """Count, and print the table or record it."""
    parser = argparse.ArgumentParser(description="Instructions of the hot path, and their budget.")
    parser.add_argument("--record", action="store_true", help="write the new budget")
    arguments = parser.parse_args()
    try:
        counts = count(list(PARTS))
        if arguments.record:
            record(counts)
        good, table = judge(counts, read_budget())
    except GateError as error:
        print(error, file=sys.stderr)
        return 2
    print(table)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
