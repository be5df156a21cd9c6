"""A job as data: typed and frozen. Every default is here; every shipped recipe comments its keys.

The values of the paper (Sec. 4.1, appendix 6) are the preset `paper`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator, model_validator

from ppcl_toolkit.adapter import import_beside
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Interval, TextRun
from ppcl_toolkit.recipe_files import Section, find_recipe, read_recipe
from ppcl_toolkit.units import UNITS, check_size
from ppcl_toolkit.values import Count, Decay, Name, Seed, Seeds, Share, check_call

Lossname = Literal["direction", "relative_mse", "direction_magnitude"]
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "probe": {"steps": 2000},
        "intervals": {"strategy": "trend"},
        "select": {"order": "paper"},
        "depth": {"steps": 6000, "batch": 2, "loss": "direction", "init": "first", "inputs": "teacher"},
        "width": {"steps": 2000, "batch": 2, "loss": "direction", "text_threshold": 0.999, "ffn_blocks": 3},
        "finetune": {"steps": 1000, "batch": 4},
    }
}


class Teacher(Section):
    """The pipeline to compress, and how its images are made."""

    path: str
    """Hub id, pipeline folder, or `shapes`: the embedded one."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the weights in memory."""
    streamed: Literal[True, False, "auto"] = "auto"
    """One block on the device at a time; `auto` for the stages that take more of it than there is otherwise."""
    chunk: PositiveInt = 8
    """Batches that share one visit of a streamed block."""
    waiting_gb: PositiveFloat | None = None
    """Gigabytes of the host in which blocks that learn wait, when streamed; more wait on disk. Default: half of all."""
    call: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of every call of the pipeline: steps, guidance, height, width, ..."""

    @model_validator(mode="after")
    def _can_be_called(self) -> "Teacher":
        check_call(self.call)
        return self


class Samples(Section):
    """What the teacher is run on: its own images of prompts, its own edits of images, or image-caption pairs."""

    prompts: str = "shapes"
    """Text file with one prompt a line, or `shapes`: captions of the embedded world's training side."""
    images: str | None = None
    """Folder of images, each with a .txt caption beside it; replaces `prompts`."""
    edits: str | None = None
    """For editing pipelines: folder of images to edit, each with a .txt instruction beside it; replaces `prompts`."""
    count: PositiveInt = 160
    """Samples to record (paper: 160 for calibration)."""
    batch: PositiveInt = 1
    """Prompts in one call of the pipeline; pairs with an image go one at a time."""
    sigma_mean: float = 0.0
    sigma_std: PositiveFloat = 1.0
    """Noise levels of training: sigma = sigmoid(normal(mean, std))."""

    @model_validator(mode="after")
    def _one_source(self) -> "Samples":
        if self.images and self.edits:
            raise ValueError("give images (finished ones, with captions) or edits (images to edit), not both")
        return self


class Probe(Section):
    """Linear probes, Eq. 1 and 2."""

    batches: PositiveInt = 40
    batch: PositiveInt = 4
    ridge: PositiveFloat = 1e-6
    """Of the squares of a map's weights, relative to the variance of the feature that each reads."""
    steps: Count = 0
    """AdamW steps after the closed form (paper: 2000); the closed form already is the minimum of Eq. 2."""
    learning_rate: PositiveFloat = 1e-4


class Intervals(Section):
    """Candidates for removal, Eq. 3-5 and Algorithm 1."""

    strategy: Literal["trend", "threshold", "given"] = "trend"
    """`trend` is the paper's; `threshold` its ablation LP-a; `given` takes the list below."""
    stream: Literal["image", "text", "mean"] = "image"
    """Whose CKA decides."""
    threshold: Share = 0.98
    first_block: dict[str, Count] = Field(default_factory=dict)
    """Per stack, the first block that may belong to an interval."""
    given: tuple[Interval, ...] = ()
    batches: PositiveInt = 10
    batch: PositiveInt = 4


class Modulation(Section):
    """Modulation layers of low rank, in closed form."""

    rank: PositiveInt | None = None
    """Of all layers."""
    error: PositiveFloat | None = None
    """Instead: relative velocity error that it may cost; the smallest rank below it is taken."""
    guidance: tuple[float, ...] = ()
    """Of a guidance-distilled model: values of guidance to cover. Default: the recorded ones."""
    batches: PositiveInt = 128
    """Batches whose conditioning is recorded."""
    batch: PositiveInt = 8
    velocity_batches: PositiveInt = 4
    """Batches on which ranks are measured."""

    @model_validator(mode="after")
    def _one_way(self) -> "Modulation":
        if (self.rank is None) == (self.error is None):
            raise ValueError("give rank, or the error that it may cost")
        return self


class Tuning(Section):
    """How one target is fine-tuned, where it is not as all are: the smaller a student, the more it has to learn."""

    steps: PositiveInt | None = None
    learning_rate: PositiveFloat | None = None


class Target(Section):
    """One size to export."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    name: Name
    params: str | None = None
    """At most this many transformer parameters: a share of the teacher's (`70%`) or a number (`8B`, `650M`)."""
    bytes: str | None = None
    """At most so many bytes of the transformer as exported: a share (of the teacher's in that dtype), or `12GB`."""
    flops: str | None = None
    """At most so many floating-point operations of a call with one picture: a share, or `40T`, `900G`."""
    depth: str | None = None
    """Where intervals stop: at most so many parameters by depth alone, the rest by width. Default: with the target."""
    width: bool = True
    """Whether text streams and FFNs may go; without it, and modulation, the variant is a stock diffusers folder."""
    modulation: bool = False
    """Whether the modulation of all blocks is of low rank, before anything else goes; sizes may then be left out."""
    finetune: Tuning | None = Tuning()
    """How its student is fine-tuned as a whole, in what differs from all; `false`: it is what the bank holds."""

    @property
    def asked(self) -> dict[str, str]:
        """The sizes that are asked for, by unit."""
        return {unit: size for unit in UNITS if (size := getattr(self, unit)) is not None}

    @field_validator("finetune", mode="before")
    @classmethod
    def _whether(cls, finetune: Any) -> Any:
        return ({} if finetune else None) if isinstance(finetune, bool) else finetune

    @field_validator("params", "bytes", "flops", "depth")
    @classmethod
    def _is_a_size(cls, size: str | None, info: ValidationInfo) -> str | None:
        try:
            if size is not None:
                check_size(size, "params" if info.field_name == "depth" else str(info.field_name))
        except PpclError as error:
            raise ValueError(str(error)) from error
        return size

    @model_validator(mode="after")
    def _is_smaller(self) -> "Target":
        if not self.asked and (self.depth or not self.modulation):
            raise ValueError(f"{', '.join(UNITS)} are missing: without any a target needs modulation: true, no depth")
        return self

    @model_validator(mode="after")
    def _has_a_rest(self) -> "Target":
        if self.depth and not self.width:
            raise ValueError(
                f"target {self.name!r} has a depth of its own and no width for the rest; give the sizes alone"
            )
        return self


class Select(Section):
    """Which candidates go for which target, by measured substitution error."""

    batches: PositiveInt = 4
    batch: PositiveInt = 8
    order: Literal["price", "paper", "program"] = "price"
    """`price`: the least error per parameter saved first; `paper`: intervals, then deep text runs, then linear FFNs;
    `program`: the least sum of errors by an integer program, from all intervals up to `longest` and parts of text runs,
    measured together and solved again while that helps."""
    method: str | None = None
    """Instead of an order, a method of `ppcl compare` by name: its rule, its start, its losses; steps stay as here."""
    longest: Annotated[int, Field(ge=2)] = 4
    """Blocks of the longest interval that a program tries beside those of Algorithm 1."""


class Training(Section):
    """What all three training stages share."""

    steps: Count
    batch: PositiveInt = 2
    """Samples per step and process."""
    learning_rate: PositiveFloat = 1e-4
    warmup: Count = 20
    """Steps of linear warm-up; then cosine decay to zero."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.02
    clip: PositiveFloat | None = 1.0
    """Largest gradient norm."""
    checkpoint_every: PositiveInt = 200
    """Steps between states on disk."""


class Distillation(Training):
    """What training segment by segment adds."""

    split: Literal["samples", "segments"] = "samples"
    """What several processes share out: samples, averaging gradients; or segments, each with the blocks it learns from.

    Segments are pipelined: hidden states go from process to process, gradients never, and results are those of one.
    """


class Depth(Distillation):
    """Non-sequential distillation of intervals, Eq. 6 and 7."""

    steps: Count = 6000
    loss: Lossname = "direction"
    init: Literal["first", "best", "average"] = "first"
    """Weights a student starts from: block u (paper), the block with the least error behind an affine map, the mean."""
    inputs: Literal["teacher", "student", "mixed"] = "teacher"
    """`student` is sequential distillation; `mixed` goes over to it halfway."""


class Width(Distillation):
    """Linear text streams and FFNs, Eq. 8-12."""

    steps: Count = 2000
    loss: Lossname = "direction"
    alignment: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the linear alignment loss, Eq. 12, relative to the energy of what is aligned."""
    text_threshold: Share = 0.999
    """Smallest CKA between the text of a run's reference and of its other blocks."""
    text_blocks: Count = 0
    """Most blocks whose text stream goes, deeper first."""
    ffn_blocks: Count = 3
    """Most blocks whose FFNs go, the most linear first."""
    given: tuple[Annotated[TextRun | FfnSwap, Field(discriminator="kind")], ...] = ()
    """Replaces the search."""
    batches: PositiveInt = 20
    """Batches for the least-squares start."""
    ridge: PositiveFloat = 1e-6
    """As that of the probes."""


class Finetune(Training):
    """Velocity matching of the whole student against the teacher."""

    steps: Count = 1000
    batch: PositiveInt = 4
    optimizer: Literal["auto", "adamw", "adamw8bit", "adafactor"] = "auto"
    """adamw takes 16 bytes a parameter, adamw8bit 4.1, adafactor 2; `auto` is the first that fits."""
    offload: Literal["auto", "none", "blocks"] = "auto"
    """`blocks`: all but the block at work rests on the host, and blocks compute again in the backward pass."""
    gradient_checkpointing: bool = False
    """Recompute the blocks' activations in the backward pass instead of keeping them."""
    shard: bool = False
    """Spread weights, gradients and optimizer states over the processes (FSDP)."""
    features: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the feature terms: the depth loss at the end of every interval."""
    feature_loss: Lossname = "relative_mse"


class Export(Section):
    """The variants on disk."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


class Evaluate(Section):
    """Images of teacher and variants at equal seeds, and what is measured on them."""

    prompts: str = "shapes"
    """Text file with one prompt a line, or `shapes`: captions that no training saw, with their scorer."""
    edits: str | None = None
    """For editing pipelines: folder of images to edit, each with a .txt instruction beside it; replaces `prompts`."""
    count: PositiveInt = 70
    seeds: Seeds = (0, 1, 2)
    batch: PositiveInt = 1
    velocity_batches: PositiveInt = 4
    """Batches for the relative velocity error."""


class Recipe(Section):
    """A compression job."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    preset: Literal["default", "paper"] = "default"
    adapter: str = "auto"
    """A family, or `package.module:NAME`, whose module may lie beside this file; `auto` goes by the teacher's class."""
    seed: Seed = 42
    device: str = "auto"
    teacher: Teacher
    samples: Samples = Samples()
    probe: Probe = Probe()
    intervals: Intervals = Intervals()
    targets: Annotated[tuple[Target, ...], Field(min_length=1)]
    modulation: Modulation | None = None
    select: Select = Select()
    depth: Depth = Depth()
    width: Width = Width()
    finetune: Finetune = Finetune()
    export: Export = Export()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _names_differ(self) -> "Recipe":
        names = [target.name for target in self.targets]
        # Some file systems do not tell upper from lower case.
        if len({name.lower() for name in names}) < len(names):
            raise ValueError(f"targets share a name: {names}")
        asked = any(target.modulation for target in self.targets)
        if asked and self.modulation is None:
            raise ValueError("a target asks for modulation: give a section modulation with a rank, or an error")
        if self.modulation is not None and not asked:
            raise ValueError("no target has modulation: true, so the section modulation has no use")
        return self

    @property
    def searches(self) -> bool:
        """Whether blocks have to go for any target: without it there is nothing to probe, and nothing to train."""
        return any(target.asked for target in self.targets)

    @property
    def tuned(self) -> tuple[str, ...]:
        """Targets whose students are fine-tuned; where modulation is all that changes, 0 steps are none."""
        worth = (target for target in self.targets if self.searches or self.tuning(target.name).steps > 0)
        return tuple(target.name for target in worth if target.finetune is not None)

    def tuning(self, name: str) -> Finetune:
        """Return how a target is fine-tuned: by what it says itself, else by the section."""
        (own,) = (target.finetune for target in self.targets if target.name == name)
        return self.finetune.model_copy(update=own.model_dump(exclude_none=True) if own else {})

    @property
    def answered(self) -> Finetune:
        """The fine-tuning that asks the teacher most: its answers serve all targets."""
        return max((self.tuning(name) for name in self.tuned), key=lambda own: own.steps, default=self.finetune)

    @classmethod
    def load(cls, source: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a YAML file or a shipped recipe by name; `overrides` are `section.key=value`.

        An adapter of one's own, `package.module:NAME`, is imported, also where its module lies beside the file. Raises
        `PpclError` that names the line and the nearest known key.
        """
        recipe = read_recipe(cls, source, overrides)
        import_beside(recipe.adapter, find_recipe(source).parent)
        return recipe
