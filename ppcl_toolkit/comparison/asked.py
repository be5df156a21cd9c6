"""A comparison as data: which methods, at which sizes, from which training seeds, for how many block passes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from ppcl_toolkit.recipe import Recipe, Target
from ppcl_toolkit.recipe_files import Section, read_recipe
from ppcl_toolkit.values import Name, Seed, Seeds


class Scoring(Section):
    """Calibration of methods that score blocks one by one."""

    batches: PositiveInt = 4
    batch: PositiveInt = 16
    """Samples per batch."""


class Trials(Section):
    """Learning rates that every method tries at every size before its runs; the best of them is the runs' own."""

    factors: Annotated[tuple[PositiveFloat, ...], Field(min_length=2)] = (0.3, 1.0, 3.0)
    """Of the learning rates of the job."""
    seed: Seed = 7
    """Of training; no run has it."""
    batches: PositiveInt = 8
    """Noised batches of their own, on which the least velocity error decides: no trial sees what runs are scored by."""


class Aim(Section):
    """One size that every method is to have."""

    name: Name
    params: str | None = None
    """Transformer parameters: a share of the teacher's (`70%`) or a number."""
    flops: str | None = None
    """Instead: floating-point operations of a call with one picture."""

    @model_validator(mode="after")
    def _one_unit(self) -> "Aim":
        if (self.params is None) == (self.flops is None):
            raise ValueError("give params or flops, the one in which methods are matched")
        self.target  # noqa: B018 - its own rules
        return self

    @property
    def target(self) -> Target:
        """The same as a recipe has it."""
        return Target(name=self.name, params=self.params, flops=self.flops)


class Comparison(Section):
    """Methods x targets x training seeds."""

    job: str = "tiny"
    """Recipe, by name or file, that gives teacher, samples, calibration, learning rates and evaluation to all."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """`section.key: value` of that recipe, in place of its own."""
    methods: Annotated[tuple[str, ...], Field(min_length=1)]
    """By name, or by the name of a file of several."""
    reference: str = "default"
    """Method that the others are tested against; one of them."""
    modulation: Literal["without", "with", "both"] = "both"
    """Whether methods have modulation of low rank beneath them: none, all, or each once so and once so."""
    targets: Annotated[tuple[Aim, ...], Field(min_length=1)]
    seeds: Seeds = (0, 1, 2)
    """Of training; the unit of the test."""
    passes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    """Block passes of every run, searches and all: a block forward on a sample is one, forward and backward three.

    Of several budgets, every method has every one.
    """
    trials: Trials | None = None
    """Without them, all methods learn at the rates of the job."""
    tolerance: PositiveFloat = 0.01
    """Runs whose size is further off the target are marked; off the reference's, not tested."""
    scoring: Scoring = Scoring()

    @field_validator("passes", mode="before")
    @classmethod
    def _one_budget(cls, passes: Any) -> Any:
        return passes if isinstance(passes, (list, tuple)) else (passes,)

    @model_validator(mode="after")
    def _trials_are_held_out(self) -> "Comparison":
        if self.trials is not None and self.trials.seed in self.seeds:
            raise ValueError(f"trials.seed {self.trials.seed} is one of the seeds, which are for runs alone")
        return self

    @model_validator(mode="after")
    def _can_be_told_apart(self) -> "Comparison":
        for what in (self.methods, self.passes, tuple(target.name.lower() for target in self.targets)):
            if len(set(what)) < len(what):
                raise ValueError(f"one of these stands there twice: {what}")
        return self

    @property
    def levers(self) -> tuple[bool, ...]:
        """Whether modulation is of low rank, for each pass over the methods."""
        return {"without": (False,), "with": (True,), "both": (False, True)}[self.modulation]

    @classmethod
    def load(cls, source: str | Path, overrides: Sequence[str] = ()) -> "Comparison":
        """Read a YAML file or a shipped comparison by name, as `Recipe.load` does."""
        return read_recipe(cls, source, overrides)

    def recipe(self) -> Recipe:
        """Return the job that all runs share."""
        return Recipe.load(self.job, [f"{key}={json.dumps(value)}" for key, value in self.settings.items()])
