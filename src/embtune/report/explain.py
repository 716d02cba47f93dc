"""`model.explain()`: what is on, what is off, and why."""

from dataclasses import dataclass

from peft import PeftModel
from sentence_transformers import SentenceTransformer
from torch import nn

from embtune.adapt.fused import FusedLoraLinear
from embtune.adapt.quantised import describe_quantisation, is_quantised
from embtune.models.arguments import LoadNotes
from embtune.models.checkpointing import describe_gradient_checkpointing
from embtune.models.engine import Engine
from embtune.models.families import family_of, unwrapped
from embtune.models.modules import pooling_modules, trainable_parameters, transformer_modules


@dataclass(frozen=True)
class Explanation:
    """Rows of (what, state, reason); `str()` and the notebook's display show them as aligned lines."""

    rows: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        width = max(len(what) for what, _, _ in self.rows)
        lines = [f"{what:<{width}}  {state}" + (f"  ({why})" if why else "") for what, state, why in self.rows]
        return "\n".join(lines)

    __repr__ = __str__

    def __getitem__(self, what: str) -> str:
        """The state of one row by its name."""
        return next(state for name, state, _ in self.rows if name == what)


def explain_model(model: SentenceTransformer, engine: Engine, notes: LoadNotes | None) -> Explanation:
    """Describe a model from its live state, with the reasons noted when it was loaded."""
    rows: list[tuple[str, str, str]] = []
    if notes is not None:
        rows.append(("model", notes.name, ""))
    fallback = engine.fallback(model)
    rows.append(("engine", "reference", fallback) if fallback else ("engine", engine.name, engine.reason))
    rows.append(("device", str(model.device), ""))
    for transformer in transformer_modules(model):
        rows += _describe_backbone(transformer.model, notes)
    rows.append(("max_seq_length", str(model.max_seq_length), "tokens; longer texts are cut"))
    modes = [str(pooling.pooling_mode) for pooling in pooling_modules(model)]
    rows.append(("pooling", ", ".join(modes) or "none", ""))
    trained = trainable_parameters(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    rows.append(("trained", f"{trained:,} of {total:,} numbers", _why_trained(model, notes)))
    return Explanation(tuple(rows))


def _describe_backbone(backbone: nn.Module, notes: LoadNotes | None) -> list[tuple[str, str, str]]:
    bare = unwrapped(backbone)
    family = family_of(bare.config)
    known = f"{bare.config.model_type}" if family else f"{bare.config.model_type}, without a row in embtune's table"
    rows = [("architecture", known, "" if family else "reference engine only; LoRA targets found from its modules")]
    weights = str(bare.dtype).removeprefix("torch.")
    if is_quantised(bare):
        weights = describe_quantisation(bare)
    rows.append(("base weights", weights, notes.weights.reason if notes else ""))
    rows.append(("attention", str(bare.config._attn_implementation), ""))
    rows.append(("gradient checkpointing", describe_gradient_checkpointing(backbone), ""))
    if isinstance(backbone, PeftModel) and not getattr(backbone, "merged", False):
        config = backbone.active_peft_config
        targets = config.target_modules
        shown = targets if isinstance(targets, str) else ", ".join(sorted(targets))
        rows.append(("LoRA", f"r={config.r}, alpha={config.lora_alpha}, dropout={config.lora_dropout} on {shown}", ""))
        if any(isinstance(module, FusedLoraLinear) for module in backbone.modules()):
            rows.append(("kernels", "fused", 'by the trainer; fused_kernels="never" in its arguments undoes it'))
    return rows


def _why_trained(model: SentenceTransformer, notes: LoadNotes | None) -> str:
    if notes and notes.for_inference:
        return "loaded for inference"
    if notes and notes.full_finetuning:
        return "full fine-tuning"
    heads = sum(trainable_parameters(module) for module in list(model.children())[1:])
    if any(isinstance(transformer.model, PeftModel) for transformer in transformer_modules(model)):
        return f"the adapter, and {heads:,} in the heads behind the encoder" if heads else "the adapter"
    return "call get_peft_model for LoRA, or load with full_finetuning=True" if not heads else "the heads only"
