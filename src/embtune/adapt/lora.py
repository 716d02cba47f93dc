"""LoRA through PEFT: which layers are adapted, with which settings, and a wrapper that saves whole models."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoftQConfig, LoraConfig, PeftConfig, PeftModel, PeftModelForFeatureExtraction, TaskType
from torch import nn
from transformers import PreTrainedModel

from embtune.adapt.merge import iter_merged_tensors
from embtune.adapt.quantised import is_quantised
from embtune.adapt.saving import save_adapter, save_encoder, save_verified
from embtune.adapt.targets import pooler_layers, resolve_modules_to_save, resolve_targets, within_layers
from embtune.errors import ArgumentError, ModelError
from embtune.runtime import seeded


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The arguments of `get_peft_model`, checked, with PEFT's meaning."""

    r: int = 16
    """Rank of the low-rank product B·A."""
    lora_alpha: float = 16
    """Scale: the product is multiplied by lora_alpha / r (by lora_alpha / √r with rank-stabilised LoRA)."""
    lora_dropout: float = 0.0
    """Dropout on the input of the low-rank product, 0 ≤ p < 1."""
    target_modules: str | Sequence[str] | None = None
    """Layers to adapt: name endings, a regular expression, "all-linear", or None for the family's own list."""
    bias: str = "none"
    """Which bias vectors are trained: "none", "all" or "lora_only"."""
    use_rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed adapters (Liu et al. 2024, arXiv:2402.09353)."""
    init_lora_weights: bool | str = True
    """PEFT's initialisation: True (B = 0), False (random B), "gaussian", "pissa", "olora", "loftq" …"""
    loftq_config: Mapping[str, Any] | LoftQConfig | None = None
    """Settings of the LoftQ initialisation; needs init_lora_weights="loftq" and an unquantised base."""
    layers_to_transform: int | Sequence[int] | None = None
    """Indices of the encoder layers to adapt; None adapts all."""
    modules_to_save: Sequence[str] | None = None
    """Modules outside LoRA that are trained and saved whole."""
    random_state: int = 3407
    """Seed of the adapter's initialisation; the program's own random state is left as it was."""
    task_type: TaskType | str | None = field(default=TaskType.FEATURE_EXTRACTION)
    """Only FEATURE_EXTRACTION: an embedding model has no other head."""

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or self.r < 1:
            raise ArgumentError(f"r={self.r!r}: the rank of LoRA is a whole number from 1 up.")
        if not 0 <= self.lora_dropout < 1:
            raise ArgumentError(f"lora_dropout={self.lora_dropout!r} must lie in [0, 1).")
        if self.bias not in ("none", "all", "lora_only"):
            raise ArgumentError(f'bias={self.bias!r} is not known; use "none", "all" or "lora_only".')
        if self.task_type not in (None, TaskType.FEATURE_EXTRACTION, "FEATURE_EXTRACTION"):
            raise ArgumentError(f"task_type={self.task_type!r}: embedding models train as FEATURE_EXTRACTION.")
        if self.loftq_config and self.init_lora_weights != "loftq":
            raise ArgumentError('loftq_config is used only with init_lora_weights="loftq".')


class AdaptedEncoder(PeftModelForFeatureExtraction):
    """PEFT's model around an encoder; unlike PEFT's own, once merged it saves the whole encoder.

    `merge_and_unload()` also works on a quantised base: weights are de-quantised before ΔW is added, because adding it
    to 4-bit weights and quantising again loses what was trained.
    """

    merged = False
    """Whether `merge_and_unload` has been called: no adapter is left, and the encoder is whole."""
    resized_vocabulary = False
    """Whether tokens were added to the base: its embeddings then travel with the adapter."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's, with the states of all layers where the config asks for them (losses over layers do so there)."""
        # PEFT hands on None where nothing is said, which transformers takes for no, whatever the config says.
        if kwargs.get("output_hidden_states") is None and self.config.output_hidden_states:
            kwargs["output_hidden_states"] = True
        return super().forward(*args, **kwargs)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> PreTrainedModel:
        """Add the adapter to the base weights, in place, and return the plain encoder.

        The sum is taken in float32. The encoder then has the dtype of the checkpoint that it was loaded from, float32
        after a quantised base. Calling it twice is harmless.

        The encoder's `save_pretrained` is `save_encoder`: it refuses the folder of an adapter.

        Raises:
            ArgumentError: `adapter_names` names other adapters than the active ones.
        """
        if self.merged:
            return self.get_base_model()
        if adapter_names is not None and set(adapter_names) != set(self.active_adapters):
            raise ArgumentError(f"adapter_names={adapter_names}: only the active {self.active_adapters} can be merged.")
        base = self.get_base_model()
        checkpoint_dtype = getattr(base, "checkpoint_dtype", None) or base.dtype
        if is_quantised(base):
            dense = dict(iter_merged_tensors(self))
            encoder = self.base_model.unload()
            _replace_quantised(encoder, dense)
        else:
            base.to(torch.float32)
            encoder = self.base_model.merge_and_unload(progressbar=progressbar, safe_merge=safe_merge)
            encoder.to(checkpoint_dtype)
        self.merged = True
        return save_verified(encoder)

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True, **options: Any) -> None:
        """Write the adapter, or the whole encoder once it is merged; atomic, and read back before it appears.

        Args:
            save_directory: may hold an earlier save of the same kind, which is replaced.
            safe_serialization: only True.
            options: PEFT's own, or transformers' once the adapter is merged.

        Raises:
            ArgumentError: the folder holds a sentence-transformers model, or files of the other kind.
            ExportError: the files, read back, are not what is in memory; nothing is left behind.
        """
        options["safe_serialization"] = safe_serialization
        if self.merged:
            save_encoder(self.get_base_model(), save_directory, **options)
        else:
            options.setdefault("save_embedding_layers", self.resized_vocabulary)
            save_adapter(self, save_directory, **options)


def _replace_quantised(encoder: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put dense linear layers with the given weights in the place of quantised ones, in the instance."""
    for name, module in list(encoder.named_modules()):
        weight_name = f"{name}.weight"
        if not isinstance(module, nn.Linear) or weight_name not in tensors:
            continue
        weight = tensors[weight_name]
        dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device=weight.device)
        dense.weight = nn.Parameter(weight.to(torch.float32), requires_grad=False)
        if module.bias is not None:
            dense.bias = nn.Parameter(tensors[f"{name}.bias"].to(torch.float32), requires_grad=False)
        parent_name, _, child = name.rpartition(".")
        setattr(encoder.get_submodule(parent_name), child, dense.train(module.training))
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(encoder.config, attribute):
            delattr(encoder.config, attribute)
    for attribute in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "hf_quantizer"):
        if attribute in encoder.__dict__:
            delattr(encoder, attribute)
    # transformers refuses to cast a model that it takes for quantised; this one no longer is.
    nn.Module.to(encoder, torch.float32)
    encoder.config.dtype = torch.float32


def attach_lora(backbone: PreTrainedModel, settings: LoraSettings) -> AdaptedEncoder:
    """Freeze the backbone and put LoRA adapters, in float32, on its layers.

    Raises:
        ArgumentError: a target names no linear layer, or a setting does not fit the model.
        ModelError: the backbone has adapters already.
    """
    if isinstance(backbone, PeftModelForFeatureExtraction) or getattr(backbone, "_hf_peft_config_loaded", False):
        raise ModelError("This model has an adapter already; load the base again, or merge it first.")
    targets = resolve_targets(backbone, settings.target_modules)
    if settings.layers_to_transform is not None:
        targets = within_layers(backbone, targets, settings.layers_to_transform)
    saved_whole = resolve_modules_to_save(backbone, settings.modules_to_save or ())
    if settings.loftq_config and is_quantised(backbone):
        raise ArgumentError("loftq_config: LoftQ starts from unquantised weights; load without load_in_4bit/8bit.")
    loftq = settings.loftq_config or {}
    config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        exclude_modules=pooler_layers(backbone, targets),
        bias=settings.bias,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=settings.init_lora_weights,
        loftq_config=loftq if isinstance(loftq, LoftQConfig) else (LoftQConfig(**loftq) if loftq else {}),
        modules_to_save=saved_whole or None,
    )
    with seeded(settings.random_state, backbone.device), _without_old_names():
        try:
            adapted = AdaptedEncoder(backbone, config)
        except ValueError as error:
            raise ArgumentError(f"PEFT refuses these LoRA settings: {error}") from error
    adapted.resized_vocabulary = vocabulary_was_resized(backbone)
    return adapted


@contextmanager
def _without_old_names() -> Iterator[None]:
    """PEFT asks a model for an attribute that transformers renamed; nobody who uses embtune can change that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def continue_adapter(backbone: PreTrainedModel, folder: Path, *, trainable: bool) -> AdaptedEncoder:
    """Put the LoRA adapter that was saved in `folder` onto its base, in float32, to train it further.

    Raises:
        ModelError: the folder holds another kind of adapter, or weights that do not fit the base.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.task_type is None:  # what a plain `get_peft_model` leaves there
            config.task_type = TaskType.FEATURE_EXTRACTION
        with _without_old_names():
            # PEFT goes on with untrained layers where the names in the file are those of another class.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(backbone, str(folder), is_trainable=trainable, config=config)
    except (RuntimeError, ValueError, OSError, UserWarning) as error:
        raise ModelError(f"The adapter in {folder} does not fit its base model: {error}") from error
    if type(adapted) is not PeftModelForFeatureExtraction or not isinstance(adapted.active_peft_config, LoraConfig):
        raise ModelError(f"{folder} holds no LoRA adapter for feature extraction; embtune continues those only.")
    adapted.__class__ = AdaptedEncoder
    adapted.resized_vocabulary = vocabulary_was_resized(backbone)
    return adapted


def vocabulary_was_resized(backbone: PreTrainedModel) -> bool:
    """Whether tokens were added since the checkpoint was loaded."""
    loaded = getattr(backbone, "checkpoint_vocabulary", None)
    return loaded is not None and backbone.get_input_embeddings().weight.shape[0] != loaded
