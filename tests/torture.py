"""Kill, damage, fill up, start twice and mutate, at random, for as long as is asked: `make torture`.

    python tests/torture.py --minutes 30 --seed 1 [--only kills ranks twice full damage mutants] [--most 200]

What fails is printed with what repeats it, and the exit code is 1.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import mutants
from children import Child, running
from test_damage import DAMAGES, STAGES, asked, contents

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
            shutil.rmtree(out.parent)


def kills(trial: Trial, whole: dict[str, bytes], ranks: int = 1) -> None:
    """`kill -9` of a random process at random moments of all stages, a few times a run, and on."""
    while trial.goes_on("kills"):
        out, left, stages = trial.place(), trial.rng.randrange(3, 12), []
        while True:
            children = running(trial.recipe, out, ranks=ranks)
            if left and trial.goes_on("kills") and (stage := _killed(trial, children)):
                stages.append(stage)
                left -= 1
                trial.figures["kills"] += 1
                trial.figures[f"in {stage.split('/')[0]}"] += 1
                continue
            ends = [child.wait() for child in children]
            if any(how != "done" for how, _ in ends):
                trial.fail(f"after kills in {stages}: {ends}")
            else:
                trial.compared(out, whole, f"after kills in {stages}")
            break


def _killed(trial: Trial, children: list[Child]) -> str | None:
    """Kill one of a run's processes some time after a random stage began; the others end by themselves."""
    first, stage = trial.rng.randrange(len(ORDER)), "start"
    while ORDER.index(stage.split("/")[0]) < first and children[0].end is None:
        for told in children[0].told(300):
            stage = told[0]
    # Fresh processes take seconds, everything else far less.
    until = time.monotonic() + trial.rng.choice((0.05, 0.5, 8)) * trial.rng.random()
    while time.monotonic() < until and children[0].end is None:
        for told in children[0].told(until - time.monotonic()):
            stage = told[0]
    if children[0].end is not None:
        return None
    victim = trial.rng.choice(children)
    victim.kill()
    for other in children:
        how, said = other.wait(120)
        if other is not victim and how not in ("killed", "refused"):
            trial.fail(f"one of {len(children)} killed in {stage}: the other {how} {said}")
    return stage


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
            trial.fail(f"two runs: {ends}")
        else:
            trial.compared(out, whole, "two runs")


def full(trial: Trial, whole: dict[str, bytes]) -> None:
    """A disk without room from a random file on: one sentence, and the same command goes on when there is room."""
    out = trial.place()
    (child,) = running(trial.recipe, out)
    how, files = child.wait()
    if how != "done":
        trial.fail(f"full disk: the first run {how}: {files}")
        return
    while trial.goes_on("full disks"):
        out, room, at = trial.place(), 0, []
        while room < files and len(at) < 6:
            room = trial.rng.randrange(room, files + 1)
            (child,) = running(trial.recipe, out, full=room)
            how, said = child.wait()
            if how == "done":
                break
            at.append(room)
            trial.figures["full disks"] += 1
            if how != "refused" or "disk is full" not in said:
                trial.fail(f"full disk after {room} files: {how}: {said}")
        (child,) = running(trial.recipe, out)
        how, said = child.wait()
        if how != "done":
            trial.fail(f"after disks full at {at}: {how}: {said}")
        else:
            trial.compared(out, whole, f"after disks full at {at}")


def damaged(trial: Trial, whole: dict[str, bytes]) -> None:
    """A random file of a finished run cut, flipped, emptied or deleted: named, or made again, never used."""
    run = trial.world / "run"
    names = sorted(p.relative_to(run) for p in run.rglob("*") if p.is_file() and p.name != ".lock" and p.stat().st_size)
    while trial.goes_on("files damaged"):
        out, name, damage = trial.place(), trial.rng.choice(names), trial.rng.choice(DAMAGES)
        shutil.copytree(run, out)
        damage(out / name)
        trial.figures["files damaged"] += 1
        what = f"{name} {damage.__name__}"
        (child,) = running(trial.recipe, out)
        how, said = child.wait()
        if how == "refused":
            trial.figures["named"] += 1
            if name.name not in said and name.name not in ("made_from.json", "manifest.json"):
                trial.fail(f"{what}: not named: {said}")
            if trial.rng.random() < 0.3:
                (child,) = running(trial.recipe, out, remake=True)
                how, said = child.wait()
                trial.figures["made again"] += how == "done"
                if how != "done":
                    trial.fail(f"{what}: not made again: {said}")
                else:
                    trial.compared(out, whole, f"{what}, made again")
        elif how != "done" or name.name not in NO_RESULTS:
            trial.fail(f"{what}: {how} {said}")
        shutil.rmtree(out.parent, ignore_errors=True)


def mutated(trial: Trial, _: dict[str, bytes]) -> None:
    """Mutated recipes, plans, records and indexes: read, or refused in one sentence, in 5 s and 1 GB."""
    while trial.goes_on("mutants"):
        seed = f"{trial.seed}/{trial.figures['mutants']}"
        child = Child(lambda tell: mutants.batch(trial.world, seed, tell), trial.world / "mutants.log")  # noqa: B023
        how, found = child.wait(900)
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
    failures = []
    with tempfile.TemporaryDirectory(prefix="torture-") as place:
        world = asked(Path(place))
        whole = {ranks: _undisturbed(world, ranks) for ranks in ((1, 2) if "ranks" in given.only else (1,))}
        share = 60 * given.minutes / sum(SHARES[name] for name in given.only)
        for name in given.only:
            trial = Trial(world, f"{given.seed}/{name}", share * SHARES[name], given.most)
            started = time.monotonic()
            TORTURES[name](trial, whole[2 if name == "ranks" else 1])
            told = ", ".join(f"{count:,} {figure}" for figure, count in trial.figures.items())
            seconds = time.monotonic() - started
            print(f"{name:8} {len(trial.failures)} failures: {told} ({seconds:.0f} s)", flush=True)  # noqa: T201
            failures += trial.failures
    for failure in failures:
        print(f"FAILED {failure}", flush=True)  # noqa: T201
    return bool(failures)


def _undisturbed(world: Path, ranks: int) -> dict[str, bytes]:
    out = world / ("run" if ranks == 1 else f"run-{ranks}")
    ends = [child.wait(600) for child in running(world / "recipe.yaml", out, ranks=ranks)]
    assert all(how == "done" for how, _ in ends), ends
    return contents(out)


if __name__ == "__main__":
    sys.exit(main())
