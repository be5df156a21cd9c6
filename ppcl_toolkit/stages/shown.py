"""Records of a run as its report reads them: earlier versions wrote less."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from ppcl_toolkit.training.substitution import Candidate
from ppcl_toolkit.units import Cost


class Row(BaseModel):
    """What the table shows of a pipeline; earlier runs have less of it."""

    name: str = "teacher"
    opens: str | None = None
    params: PositiveInt
    bytes: PositiveInt
    flops: int | None = None
    latency_ms: PositiveFloat
    latency_batch: PositiveInt
    memory_of: str
    memory_bytes: int | None
    score: float | None
    score_std: float | None
    categories: dict[str, tuple[float, float]] = {}
    chance: float | None = None
    rmse: float | None = None
    velocity_error: float | None = None
    drop_percent: float | None = None


class Summary(BaseModel):
    """What `summary.json` holds."""

    teacher: Row
    variants: list[Row]
    warnings: list[str] = []


class Environment(BaseModel):
    """What `environment.json` tells of the machine."""

    model_config = ConfigDict(extra="allow")

    gpus: list[str]
    threads: int
    packages: dict[str, str]


class Event(BaseModel):
    """A line of `events.jsonl`."""

    stage: str
    event: str
    seconds: float | None = None


class Measured(BaseModel):
    """What was measured of one candidate."""

    operation: Annotated[Candidate, Field(discriminator="kind")]
    label: str
    error: float
    saves: Cost | int
    chosen: list[str]


class Asked(BaseModel):
    """What the record of a stage was asked for."""

    settings: dict[str, Any] = {}


class Exam(BaseModel):
    """What pictures were made of."""

    prompts: list[str]
    seeds: list[int]
    scored: bool
