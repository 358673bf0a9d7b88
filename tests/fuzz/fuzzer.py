"""Coverage-guided fuzzing of the targets in this folder, and the replay of single inputs.

``fuzzer.py --minutes N [TARGET…]`` gives each target its share of the time on every core; needs ``dray-rl[fuzz]``.
What it learns goes to ``outputs/fuzz/TARGET/``, and an input that breaks a target is left there with the command
that replays it. ``fuzzer.py --replay TARGET FILE…`` runs inputs as they are. ``fuzzer.py --keep`` adds what was
learnt to the corpus beside this file: an input for each step from line to line that is new.
"""

import argparse
import concurrent.futures
import hashlib
import importlib
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / "outputs" / "fuzz"
MAX_INPUT_BYTES = 4096
MAX_RUN_SECONDS = 20
MAX_MEGABYTES = 3000
_SPARE_SECONDS = 120.0
_PRODUCT = str(ROOT / "src")
Step = tuple[str, int, int]

TARGETS = sorted(path.stem.removeprefix("fuzz_") for path in HERE.glob("fuzz_*.py"))


def load(target: str) -> tuple[Callable[[bytes], None], list[bytes]]:
    """What runs one input, and the inputs that the target comes with."""
    if str(HERE.parent) not in sys.path:
        sys.path.insert(0, str(HERE.parent))
    module = importlib.import_module(f"fuzz.fuzz_{target}")
    return module.run, module.SEEDS


def kept(target: str) -> list[Path]:
    """The corpus of a target, in order."""
    return sorted((HERE / "corpus" / target).glob("*"))


def replay(target: str, files: list[Path]) -> None:
    run, _ = load(target)
    for file in files:
        print(f"{target} {file}", flush=True)
        run(file.read_bytes())


def explore(target: str, seconds: int) -> None:
    """Fuzz one target in this process; libFuzzer ends the process."""
    import atheris

    logging.disable()  # one warning for each malformed connection, as it must be
    with atheris.instrument_imports(include=["dray", "tomllib"], enable_loader_override=False):
        run, seeds = load(target)
    found, given = OUTPUT / target / "corpus", OUTPUT / target / "seeds"
    for folder in (found, given):
        folder.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(seeds):
        (given / f"{index:03}").write_bytes(seed)
    limits = [f"-max_len={MAX_INPUT_BYTES}", f"-timeout={MAX_RUN_SECONDS}", f"-rss_limit_mb={MAX_MEGABYTES}"]
    folders = [str(found), str(given), str(HERE / "corpus" / target)]
    (HERE / "corpus" / target).mkdir(parents=True, exist_ok=True)
    extra = [f"-max_total_time={seconds}", "-print_final_stats=1", f"-artifact_prefix={OUTPUT / target}/"]
    atheris.Setup([sys.argv[0], *limits, *extra, *folders], run)
    atheris.Fuzz()


def fuzz(targets: list[str], minutes: float) -> int:
    """Fuzz `targets`, for `minutes` in all; how many of them were broken."""
    workers = os.cpu_count() or 1
    seconds = max(5, int(minutes * 60 * min(workers, len(targets)) / len(targets)))
    print(f"{len(targets)} targets, {seconds} s each, {workers} at a time", flush=True)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        outcomes = list(pool.map(lambda target: _explored(target, seconds), targets))
    return outcomes.count(False)


def _explored(target: str, seconds: int) -> bool:
    """Fuzz one target in a process of its own; whether it held."""
    folder = OUTPUT / target
    folder.mkdir(parents=True, exist_ok=True)
    began = time.time()
    command = [sys.executable, __file__, "--explore", target, str(seconds)]
    log = folder / "log"
    with log.open("wb") as out:
        try:
            code = subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT, timeout=seconds + _SPARE_SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    text = log.read_text(errors="replace")
    runs = re.findall(r"stat::number_of_executed_units:\s+(\d+)", text)
    edges = re.findall(r"cov: (\d+)", text)
    print(f"{target:16} {(runs or ['?'])[-1]:>9} runs  {(edges or ['?'])[-1]:>5} edges  ", end="")
    if code == 0:
        print("held", flush=True)
        return True
    print(f"BROKEN, see {log}", flush=True)
    for artifact in sorted(folder.glob("*-*")):
        if artifact.stat().st_mtime >= began:
            print(f"  replay: {sys.executable} {__file__} --replay {target} {artifact}", flush=True)
    return False


def keep(target: str) -> None:
    """Add to the kept corpus the shortest of the inputs found that take the code along a new step."""
    run, seeds = load(target)
    corpus = HERE / "corpus" / target
    corpus.mkdir(parents=True, exist_ok=True)
    known: set[Step] = set()
    for data in [*seeds, *(file.read_bytes() for file in kept(target))]:
        known |= steps(run, data)
    found = [file.read_bytes() for file in (OUTPUT / target / "corpus").glob("*")]
    for data in sorted(found, key=lambda data: (len(data), data)):
        new = steps(run, data) - known
        if new:
            known |= new
            (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    print(f"{target:16} {len(kept(target))} inputs kept, {len(known)} steps of code")


def steps(run: Callable[[bytes], None], data: bytes) -> set[Step]:
    """The pairs of lines of the product that follow each other when `data` runs."""
    taken: set[Step] = set()

    def enter(frame: FrameType, event: str, argument: object) -> Callable[..., object] | None:
        name = frame.f_code.co_filename
        if not name.startswith(_PRODUCT):
            return None
        before = 0

        def step(frame: FrameType, event: str, argument: object) -> object:
            nonlocal before
            taken.add((name, before, frame.f_lineno))
            before = frame.f_lineno
            return step

        return step

    tracing = sys.gettrace()
    sys.settrace(enter)
    try:
        run(data)
    finally:
        sys.settrace(tracing)
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--replay", nargs="+", metavar=("TARGET", "FILE"))
    parser.add_argument("--explore", nargs=2, metavar=("TARGET", "SECONDS"), help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    options = parser.parse_args()
    if unknown := sorted(set(options.targets) - set(TARGETS)):
        parser.error(f"unknown targets: {', '.join(unknown)}")
    if options.replay:
        replay(options.replay[0], [Path(name) for name in options.replay[1:]])
        return 0
    if options.explore:
        explore(options.explore[0], int(options.explore[1]))
        return 0
    targets = options.targets or TARGETS
    if options.keep:
        for target in targets:
            keep(target)
        return 0
    return 1 if fuzz(targets, options.minutes) else 0


if __name__ == "__main__":
    sys.exit(main())
