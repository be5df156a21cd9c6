"""Kill, damage, fill up, start twice and mutate, at random, for as long as is asked: `make torture`.

    python tests/torture.py --minutes 30 --seed 1 [--only kills ranks twice full damage mutants] [--most 200]

What fails is printed with what repeats it, and the exit code is 1.
"""

import argparse
import contextlib
import importlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import mutants
from children import Child, running
from runs import job
from test_damage import CHANGES, DAMAGES, STAGES, contents, kinds

from ppcl_toolkit.artifacts.variant import load_compressed

SHARES = {"kills": 0.35, "ranks": 0.15, "twice": 0.05, "full": 0.15, "damage": 0.15, "mutants": 0.15}
NO_RESULTS = (
    "report.html",
    "summary.json",
    "environment.json",
    "events.jsonl",
    "recipe.yaml",
    "teacher.json",
    "README.md",
)
"""What a run tells of itself: written again by the next one, or read by people alone."""

SMALL = (
    *(change for change in CHANGES if not change.startswith(("modulation", "width", "targets"))),
    "modulation={rank: 2, batches: 2, velocity_batches: 1}",
    "targets=[{name: small, params: 70%, modulation: true}]",
    "width={steps: 2, batch: 2, ffn_blocks: 1, text_blocks: 1, batches: 2, text_threshold: 0.1}",
    "probe.batches=2",
)
"""What runs are that take seconds and have all stages still."""
BLOCKS = (3, 2)

ORDER = ("start", *STAGES[:-1], "velocities", "finetune", "export", "evaluate")


class Trial:
    """One kind of torture: its randomness, until when it goes on, and what it found."""

    def __init__(self, world: Path, seed: str, seconds: float, most: int) -> None:
        self.world, self.recipe = world, world / "recipe.yaml"
        self.rng, self.seed = random.Random(seed), seed
        self.figures: Counter[str] = Counter()
        self.failures: list[str] = []
        self._until, self._most = time.monotonic() + seconds, most

    def goes_on(self, figure: str) -> bool:
        return time.monotonic() < self._until and self.figures[figure] < self._most

    def fail(self, what: str) -> None:
        self.failures.append(f"{self.seed}: {what}"[:600])
        print(f"FAILED {self.failures[-1]}", flush=True)  # noqa: T201

    def told(self) -> str:
        """Return the figures so far."""
        return f"{len(self.failures)} failures: " + ", ".join(f"{n:,} {figure}" for figure, n in self.figures.items())

    def place(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.world, prefix="trial-")) / "run"

    def compared(self, out: Path, whole: dict[str, bytes], what: str) -> None:
        """A run that is finished is that of the undisturbed one, bit by bit, and nothing of its way is left."""
        found = contents(out)
        if unlike := [name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name)]:
            self.fail(f"{what}: not the same: {sorted(unlike)[:5]}")
        elif left := [str(path) for path in out.rglob("*.partial")]:
            self.fail(f"{what}: left over: {left[:5]}")
        else:
            self.figures["bit-identical"] += 1
            print(f"  {self.seed}: {self.told()}", flush=True)  # noqa: T201
            shutil.rmtree(out.parent)


def kills(trial: Trial, whole: dict[str, bytes], ranks: int = 1) -> None:
    """`kill -9` of a random process at random moments of all stages, many times a run, and on."""
    while trial.goes_on("kills"):
        # In the order of the stages: no part of the way is gone twice.
        due = sorted(trial.rng.choices(range(len(ORDER)), k=trial.rng.randrange(8, 20)))
        out, stages = trial.place(), []
        while True:
            children = running(trial.recipe, out, ranks=ranks)
            if due and trial.goes_on("kills") and (stage := _killed(trial, children, due.pop(0))):
                stages.append(stage)
                trial.figures["kills"] += 1
                trial.figures[f"in {stage.split('/')[0]}"] += 1
                continue
            ends = [child.wait() for child in children]
            if any(how != "done" for how, _ in ends):
                trial.fail(f"after kills in {stages}: {_briefly(ends)}")
            else:
                trial.compared(out, whole, f"after kills in {stages}")
            break


def _killed(trial: Trial, children: list[Child], first: int) -> str | None:
    """Kill one of a run's processes some time after a stage, the `first`, began; the others end by themselves."""
    stage = "start"
    # Several have met when the first tells of anything; before, none can know of another that is gone.
    began = len(children) == 1
    while (not began or ORDER.index(stage.split("/")[0]) < first) and children[0].end is None:
        for told in children[0].told(300):
            stage, began = told[0], True
    until = time.monotonic() + trial.rng.choice((0.05, 0.5, 3)) * trial.rng.random()
    while time.monotonic() < until and children[0].end is None:
        for told in children[0].told(until - time.monotonic()):
            stage = told[0]
    if children[0].end is not None:
        return None
    victim = trial.rng.choice(children)
    victim.kill()
    for other in children:
        how, said = other.wait(600)
        # In the last stage one may have done its part.
        ended = ("killed", "refused", "done") if stage == ORDER[-1] else ("killed", "refused")
        if other is not victim and how not in ended:
            trial.fail(f"one of {len(children)} killed in {stage}: the other {how} {said}")
    return stage


def _briefly(ends: list[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [(how, "" if how == "done" else str(said)) for how, said in ends]


def twice(trial: Trial, whole: dict[str, bytes]) -> None:
    """Two runs in one folder: one works, the other is told who does."""
    while trial.goes_on("pairs"):
        out = trial.place()
        (first,) = running(trial.recipe, out)
        time.sleep(trial.rng.random() ** 2 * 4)
        (second,) = running(trial.recipe, out)
        ends = [second.wait(), first.wait()]
        refused = [said for how, said in ends if how == "refused"]
        trial.figures["pairs"] += 1
        trial.figures["refused"] += len(refused)
        if sum(how == "done" for how, _ in ends) + len(refused) < 2 or not all(
            "at work in" in said for said in refused
        ):
            trial.fail(f"two runs: {_briefly(ends)}")
        else:
            trial.compared(out, whole, "two runs")


def full(trial: Trial, whole: dict[str, bytes]) -> None:
    """A disk that is full from a random file of each stage on: one sentence, and the same command goes on with room."""
    (child,) = running(trial.recipe, trial.place())
    how, done = child.wait()
    if how != "done":
        trial.fail(f"full disk: the first run {how}: {done}")
        return
    files = done["files"]
    while trial.goes_on("full disks"):
        out, at = trial.place(), []
        for stage in ORDER:
            if not trial.goes_on("full disks"):
                break
            room = trial.rng.randrange(files.get(stage, 1))
            (child,) = running(trial.recipe, out, full=(stage, room))
            how, said = child.wait()
            if how == "done":  # what a killed run had written is not written again
                break
            at.append((stage, room))
            trial.figures["full disks"] += 1
            trial.figures[f"in {stage}"] += 1
            if how != "refused" or "disk is full" not in said:
                trial.fail(f"full disk after {room} files of {stage}: {how}: {said}")
        (child,) = running(trial.recipe, out)
        how, said = child.wait()
        if how != "done":
            trial.fail(f"after disks full at {at}: {how}: {said}")
        else:
            trial.compared(out, whole, f"after disks full at {at}")


def damaged(trial: Trial, whole: dict[str, bytes]) -> None:
    """One file of every kind of a finished run cut, flipped, emptied and deleted: named, or made again, never used."""
    run, out = trial.world / "run", trial.place()
    notes = [*(run / name for name in NO_RESULTS), run / "variants" / "small" / "README.md"]
    pairs = [(path.relative_to(run), damage) for path in [*kinds(run), *notes] for damage in DAMAGES if path.exists()]
    trial.rng.shuffle(pairs)
    shutil.copytree(run, out)
    while pairs and trial.goes_on("files damaged"):
        name, damage = pairs.pop()
        content = (out / name).read_bytes()
        if not content:
            continue
        damage(out / name)
        trial.figures["files damaged"] += 1
        _tried(trial, whole, out, (name, damage))
        if (out / name).parent.is_dir():
            (out / name).write_bytes(content)
        if {k: v for k, v in contents(out).items() if v != whole.get(k)}:
            trial.fail(f"{name} {damage.__name__}: other files have changed")
            shutil.rmtree(out)
            shutil.copytree(run, out)
    trial.figures["kinds left"] = len(pairs)


def _tried(trial: Trial, whole: dict[str, bytes], out: Path, damage: tuple[Path, Any]) -> None:
    """Run a damaged run again, open its variant, and have what is damaged made again now and then."""
    name, what = damage[0], f"{damage[0]} {damage[1].__name__}"
    # A variant without its manifest is one that something else has saved: it opens with a warning.
    unlisted = name.name == "manifest.json" and damage[1].__name__ == "delete"
    if name.parts[0] == "variants" and name.name not in NO_RESULTS and not unlisted:
        how, said = Child(
            lambda _: bool(load_compressed(out / "variants" / "small")), trial.world / "opened.log"
        ).wait()
        if how != "refused" or name.name not in said:
            trial.fail(f"{what}: the variant opens or names another: {how} {said}")
    (child,) = running(trial.recipe, out)
    how, said = child.wait()
    if how == "refused":
        trial.figures["named"] += 1
        if name.name not in said and name.name not in ("made_from.json", "manifest.json"):
            trial.fail(f"{what}: not named: {said}")
        if trial.rng.random() < 0.1:
            again = trial.place()
            shutil.copytree(out, again)
            (child,) = running(trial.recipe, again, remake=True)
            how, said = child.wait()
            trial.figures["made again"] += how == "done"
            if how != "done":
                trial.fail(f"{what}: not made again: {said}")
            else:
                trial.compared(again, whole, f"{what}, made again")
    elif how != "done" or name.name not in NO_RESULTS:
        trial.fail(f"{what}: {how}")


def mutated(trial: Trial, _: dict[str, bytes]) -> None:
    """Mutated recipes, plans, records and indexes: read, or refused in one sentence, in 5 s and 1 GB."""
    while trial.goes_on("mutants"):
        seed = f"{trial.seed}/{trial.figures['mutants']}"
        child = Child(lambda tell: mutants.batch(trial.world, seed, tell), trial.world / "mutants.log")  # noqa: B023
        how, found = child.wait()
        if how != "done":
            trial.fail(f"mutants {seed}: {how} {found}")
            trial.figures["mutants"] += 1
            continue
        figures, failures = found
        trial.figures.update(figures)
        for each in failures:
            trial.fail(each)


TORTURES = {"kills": kills, "ranks": lambda *given: kills(*given, ranks=2), "twice": twice, "full": full}
TORTURES |= {"damage": damaged, "mutants": mutated}


def main() -> int:
    """Torture, and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", default=str(random.SystemRandom().randrange(10**6)))
    parser.add_argument("--only", nargs="+", choices=SHARES, default=[*SHARES])
    parser.add_argument("--most", type=int, default=10**9, help="of each kind")
    given = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory(prefix="torture-") as place:
        world = asked(Path(place))
        whole = {ranks: _undisturbed(world, ranks) for ranks in ((1, 2) if "ranks" in given.only else (1,))}
        share = 60 * given.minutes / sum(SHARES[name] for name in given.only)
        for name in given.only:
            trial = Trial(world, f"{given.seed}/{name}", share * SHARES[name], given.most)
            started = time.monotonic()
            TORTURES[name](trial, whole[2 if name == "ranks" else 1])
            print(f"{name:8} {trial.told()} ({time.monotonic() - started:.0f} s)", flush=True)  # noqa: T201
            failures += len(trial.failures)
    return bool(failures)


def asked(folder: Path) -> Path:
    """Write a teacher and a recipe."""
    job(folder, *SMALL, blocks=BLOCKS)
    return folder


def _undisturbed(world: Path, ranks: int) -> dict[str, bytes]:
    out = world / ("run" if ranks == 1 else f"run-{ranks}")
    ends = [child.wait() for child in running(world / "recipe.yaml", out, ranks=ranks)]
    assert all(how == "done" for how, _ in ends), ends
    for name in ends[0][1]["modules"]:  # once, and not in every child
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    return contents(out)


if __name__ == "__main__":
    sys.exit(main())
