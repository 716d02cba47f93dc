"""The two doors: FastSentenceTransformer, a genuine SentenceTransformer, and FastModel, the encoder beneath it."""

import functools
import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from datasets import Column
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from embtune import runtime
from embtune.adapt.lora import AdaptedEncoder, LoraSettings, attach_lora, continue_adapter
from embtune.adapt.quantised import is_quantised, prepare_quantised_base, quantization_config
from embtune.adapt.saving import save_verified
from embtune.data.tokenise import why_not_tokenised
from embtune.errors import ArgumentError, ModelError
from embtune.export.gguf_model import save_gguf
from embtune.export.hub import push_folder
from embtune.export.merged import save_compatible, save_merged
from embtune.export.onnx import save_onnx
from embtune.export.openvino import save_openvino
from embtune.export.torchao import save_torchao
from embtune.models import load
from embtune.models.arguments import LoadNotes, Weights, choose_weights, clamp_length, refuse_unknown
from embtune.models.checkpointing import enable_gradient_checkpointing
from embtune.models.engine import Engine, choose_engine
from embtune.models.families import position_limit, unwrapped
from embtune.models.heads import keep_heads_in_float32
from embtune.models.modules import FixedParts, transformer_modules
from embtune.models.source import Source, adapter_base, local_folder
from embtune.packing.attention import register as register_attention
from embtune.packing.columns import EMBEDDING_ONLY, is_precomputed
from embtune.packing.flatten import FLAT, can_flatten, flatten, unflatten
from embtune.packing.layout import Packing
from embtune.packing.listed import LISTED, as_tensors, is_listed, lay_out
from embtune.packing.row import PREPARED
from embtune.report.explain import Explanation, explain_model
from embtune.runtime import compute_dtype
from embtune.train.checkpoint_folders import is_checkpoint_name

_SAVE_METHODS = ("merged", "merged_16bit", "merged_32bit", "lora")


class FastSentenceTransformer(SentenceTransformer):
    """A SentenceTransformer with LoRA, exact merging and verified exports; load it with `from_pretrained`."""

    load_notes: LoadNotes | None = None
    engine = Engine(name="reference", reason="built by hand; from_pretrained chooses an engine")
    _fixed_parts: FixedParts | None = None

    @classmethod
    def from_pretrained(
        cls,
        model_name: str | Path,
        max_seq_length: int | None = None,
        dtype: torch.dtype | str | None = None,
        load_in_16bit: bool = False,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        full_finetuning: bool = False,
        pooling_mode: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str | None = False,
        random_state: int = 3407,
        attn_implementation: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        truncate_dim: int | None = None,
        for_inference: bool = False,
        engine: str = "auto",
        **unsupported: Any,
    ) -> Self:
        """Load a sentence-transformers folder, a bare checkpoint or an adapter folder, ready for `get_peft_model`.

        Args:
            model_name: folder, or `owner/name` on the Hub.
            max_seq_length: longest text in tokens; more than the model's positions is cut to them with a warning.
            dtype: of the base weights; None is bfloat16 where the hardware is fast at it, else float16 or float32.
            load_in_16bit, load_in_8bit, load_in_4bit: half precision, 8 bits, or NF4 with double quantisation.
            full_finetuning: train every weight instead of adapters.
            pooling_mode: `cls`, `mean`, `max`, `mean_sqrt_len_tokens`, `weightedmean` or `lasttoken`; None is the
                checkpoint's own. A bare checkpoint gets its family's pooling and a normalisation behind it.
            use_gradient_checkpointing: True or "unsloth" recompute layers in the backward pass.
            random_state: seed for weights that the checkpoint lacks.
            truncate_dim: cut embeddings to this many dimensions.
            for_inference: nothing will be trained.
            engine: "packed" (flat rows of real tokens), "reference" (padded batches), or "auto": packed where proven.
            Others have the meaning that transformers and sentence-transformers give them.

        Raises:
            ArgumentError: an argument is unknown, or contradicts another; the message names it.
            ModelError: nothing loadable is found under that name.
        """
        refuse_unknown(unsupported, _parameters(cls.from_pretrained))
        source = _source(model_name, revision, token, cache_dir, local_files_only, trust_remote_code)
        base = adapter_base(source)
        if full_finetuning and (for_inference or base):
            other = "for_inference" if for_inference else "an adapter folder"
            raise ArgumentError(f"full_finetuning and {other} exclude each other.")
        settings, weights = _settings(
            device=device,
            dtype=dtype,
            load_in_16bit=load_in_16bit,
            load_in_8bit=load_in_8bit,
            load_in_4bit=load_in_4bit,
            full_finetuning=full_finetuning,
            max_seq_length=max_seq_length,
            pooling_mode=pooling_mode,
            attn_implementation=attn_implementation,
            truncate_dim=truncate_dim,
            model_kwargs=model_kwargs or {},
            processor_kwargs=processor_kwargs or {},
        )
        notes = LoadNotes(
            name=str(model_name),
            weights=weights,
            engine=engine,
            attn_implementation=attn_implementation,
            full_finetuning=full_finetuning,
            for_inference=for_inference,
            gradient_checkpointing=use_gradient_checkpointing,
        )
        with runtime.seeded(random_state, settings.device):
            model = load.load_sentence_transformer(cls, source if base is None else source.renamed(base), settings)
        model.load_notes = notes
        model.engine = choose_engine(engine, model, attn_implementation)
        for transformer in transformer_modules(model):
            _prepare(transformer.model, notes)
        if base is not None:
            folder = local_folder(source)
            load.replace_saved_modules(model, folder, settings.processor_kwargs, trust_remote_code)
            if pooling_mode is not None:
                load.set_pooling(model, pooling_mode)
            for transformer in transformer_modules(model):
                transformer.model = continue_adapter(transformer.model, folder, trainable=not for_inference)
        transformers = transformer_modules(model)
        if not transformers and (weights.bits or max_seq_length is not None):
            asked = f"load_in_{weights.bits}bit" if weights.bits else "max_seq_length"
            raise ArgumentError(f"{asked}: this model has no Transformer module that it could be for; leave it out.")
        for transformer in transformers:
            max_seq_length = clamp_length(max_seq_length, transformer.config)
        if max_seq_length is not None:
            model.max_seq_length = max_seq_length
        return model.eval() if for_inference else model

    @staticmethod
    def get_peft_model(
        model: SentenceTransformer,
        r: int = 16,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        target_modules: str | Sequence[str] | None = None,
        bias: str = "none",
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        loftq_config: Mapping[str, Any] | None = None,
        layers_to_transform: int | Sequence[int] | None = None,
        modules_to_save: Sequence[str] | None = None,
        random_state: int = 3407,
        task_type: Any = "FEATURE_EXTRACTION",
        use_gradient_checkpointing: bool | str | None = None,
        **unsupported: Any,
    ) -> SentenceTransformer:
        """Freeze the encoder and put LoRA adapters on it, in place; the arguments are PEFT's (see `LoraSettings`).

        Args:
            model: from `from_pretrained`, or any SentenceTransformer with a Transformer module.
            use_gradient_checkpointing: None keeps what was asked for at loading.

        Raises:
            ArgumentError: an argument is unknown or does not fit the model; the message names it.
            ModelError: the model has an adapter already, was loaded for inference, or has no Transformer module.
        """
        refuse_unknown(unsupported, _parameters(FastSentenceTransformer.get_peft_model))
        if not isinstance(model, SentenceTransformer) or not transformer_modules(model):
            parts = [type(part).__name__ for part in model] if isinstance(model, SentenceTransformer) else ""
            raise ModelError(
                "FastSentenceTransformer.get_peft_model needs a SentenceTransformer with a Transformer module, not "
                f"{type(model).__name__}{parts}; for a bare encoder use FastModel.get_peft_model."
            )
        notes = getattr(model, "load_notes", None)
        if notes is not None and (notes.for_inference or notes.full_finetuning):
            how = "for_inference" if notes.for_inference else "full_finetuning"
            raise ModelError(f"This model was loaded with {how}=True; load it without to train adapters.")
        settings = _lora_settings(locals())
        if use_gradient_checkpointing is None and notes is not None:
            use_gradient_checkpointing = notes.gradient_checkpointing
        for transformer in transformer_modules(model):
            transformer.model = _adapt(transformer.model, settings, use_gradient_checkpointing)
        return model

    if not TYPE_CHECKING:  # where encode has sentence-transformers' own overloads

        @functools.wraps(SentenceTransformer.encode)
        def encode(self, *args: Any, **kwargs: Any) -> Any:
            """As SentenceTransformer's; on the packed engine plain texts become one row before they are moved."""
            wanted = "sentence_embedding" if len(args) < 6 else args[5]
            if (
                kwargs.get("output_value", wanted) == "sentence_embedding"
                and kwargs.get("processing_kwargs") is None
                and self._takes_lists()
            ):
                inputs = args[0] if args else kwargs.get("inputs")
                if isinstance(inputs, Column):  # read once: it is a list from here on, which it would become later
                    inputs = inputs[:]
                    args, kwargs = ((inputs, *args[1:]), kwargs) if args else (args, {**kwargs, "inputs": inputs})
                if _are_texts(inputs):
                    kwargs["processing_kwargs"] = LISTED
            return super().encode(*args, **kwargs)

    def _takes_lists(self) -> bool:
        return (
            self.packs
            and why_not_tokenised(self) is None
            and getattr(self[0], "query_expansion", None) is None  # which replaces padding
            and self._compiled_call_impl is None  # compiled for the numbers in a list
        )

    def forward(self, input: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """As SentenceTransformer's: features in, `sentence_embedding` [texts, dimensions] added, in float32.

        On the packed engine padded features are computed as one flat row and come back padded.
        """
        if is_precomputed(input):
            return dict(input)  # a copy: Matryoshka losses cut what they are given, and ask again
        if is_listed(input):
            input = self._row_or_padded(input)
        only_embedding = input.pop(EMBEDDING_ONLY, False)
        flattened = self.flatten(input)
        if flattened is None:
            return super().forward(input, **kwargs)
        row, packing = flattened
        row = super().forward(row, **kwargs)
        if not only_embedding:
            shape = input["input_ids"].shape
            row["token_embeddings"] = unflatten(row["token_embeddings"], packing, shape)
            if "all_layer_embeddings" in row:
                layers = row["all_layer_embeddings"]
                row["all_layer_embeddings"] = tuple(unflatten(states, packing, shape) for states in layers)
        input.update({key: value for key, value in row.items() if key not in FLAT})
        return input

    def _row_or_padded(self, listed: dict[str, Any]) -> dict[str, Any]:
        tokenizer: Any = self[0].tokenizer
        row = lay_out(listed, self.engine.padding_id, "token_type_ids" in tokenizer.model_input_names)
        if row is not None and self.packs:
            return {PREPARED: row.to(self.device), EMBEDDING_ONLY: True}
        return as_tensors(listed, self.device)

    def flatten(self, features: Mapping[str, Any]) -> tuple[dict[str, Any], Packing] | None:
        """Lay features out as this model's flat row, if they are not one yet; None where they have to stay padded."""
        prepared = features.get(PREPARED)
        if not self.packs or (prepared is None and not can_flatten(features)):
            return None
        longest = max(prepared.lengths) if prepared is not None else features["input_ids"].shape[1]
        attention = self.engine.attention(self.device, compute_dtype(self.device, self.dtype), longest)
        if prepared is not None:
            return prepared.flatten(self.dtype, self.engine.mask_value, attention)
        return flatten(features, self.dtype, self.engine.padding_id, self.engine.mask_value, attention)

    def train(self, mode: bool = True) -> Self:
        """As in PyTorch; within `fixed_structure`, where every module is in that mode already, nothing is done."""
        parts = self._fixed_parts
        if parts is not None and all(module.training == mode for module in parts.modules):
            return self
        return super().train(mode)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As in PyTorch."""
        parts = self._fixed_parts
        return super().parameters(recurse) if parts is None or not recurse else iter(parts.parameters)

    @contextmanager
    def fixed_structure(self) -> Iterator[None]:
        """While this lasts, no module or parameter may be added or removed.

        A Trainer walks over all of them several times in each step, which takes PyTorch as long as an H200 needs for a
        small batch. Here it is done once.
        """
        self._fixed_parts = FixedParts(list(self.modules()), list(super().parameters()))
        try:
            yield
        finally:
            self._fixed_parts = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Another process (those of `encode` with a pool) has to know the attention that the encoder's config names.
        super().__setstate__(state)
        if self.engine.name == "packed":
            register_attention()

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As in PyTorch, but a quantised base that is on the device already stays as it is.

        `encode` moves the model in inference mode, where moving torchao's tensors onto their own device raises.
        """
        if len(args) == 1 and not kwargs and isinstance(args[0], str | torch.device) and self._is_quantised_on(args[0]):
            return self
        return super().to(*args, **kwargs)

    def _is_quantised_on(self, place: str | torch.device) -> bool:
        target, here = torch.device(place), self.device
        same = target.type == here.type and target.index in (None, here.index)
        return same and any(is_quantised(transformer.model) for transformer in transformer_modules(self))

    @property
    def packs(self) -> bool:
        """Whether batches are computed as flat rows of real tokens."""
        return self.engine.packs(self)

    def explain(self) -> Explanation:
        """What is on, what is off, and why."""
        return explain_model(self, self.engine, self.load_notes)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute encoder layers in the backward pass; the Hugging Face Trainer calls this.

        Raises:
            ArgumentError: an option other than non-reentrant checkpointing of every layer is asked for.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False) or options or every_n_layers != 1 or offload:
            raise ArgumentError(
                "Gradient checkpointing here recomputes every layer without reentrance; drop use_reentrant=True, "
                f"every_n_layers, offload and {sorted(options)} from the checkpointing arguments."
            )
        for transformer in transformer_modules(self):
            enable_gradient_checkpointing(transformer.model)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The name of `activation_checkpointing_enable` before transformers 5.2."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def save(
        self,
        path: str | Path,
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: list[str] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Save the model as it stands (an unmerged adapter as adapter files), whole or not at all.

        Before the folder appears, adapter files are read back and compared with the adapter in memory, and a whole
        model is loaded again and its embeddings compared. Only where `path` is named as the Trainer names its
        checkpoints (`checkpoint-500`) are whole models not loaded again, so that training does not wait for it.

        Raises:
            ArgumentError: the folder holds files of the other kind, or `safe_serialization` is off.
            ExportError: what was saved is not this model; nothing is left behind.
        """
        if not safe_serialization:
            raise ArgumentError("safe_serialization=False writes pickles, which embtune does not; leave it out.")
        save_compatible(
            self,
            path,
            verify=not is_checkpoint_name(path),
            model_name=model_name,
            create_model_card=create_model_card,
            train_datasets=train_datasets,
        )

    def save_pretrained_merged(
        self,
        save_directory: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        save_method: str = "merged",
        dtype: torch.dtype | str | None = None,
    ) -> Path:
        """Write the whole model with W + ΔW as its weights, checked against this one; training can go on afterwards.

        Args:
            save_directory: a folder that plain sentence-transformers, transformers and servers read.
            tokenizer: None, or this model's own; another one is refused.
            save_method: "merged" (the checkpoint's own dtype), "merged_16bit", "merged_32bit", or "lora" for the
                adapter alone.
            dtype: overrides the dtype that `save_method` implies.

        Returns:
            The folder.

        Raises:
            ArgumentError: an argument is unknown, or the folder holds files that would contradict these.
            ExportError: the folder, loaded again, gives other embeddings; nothing is left behind.
        """
        self._own_tokenizer(tokenizer)
        if save_method not in _SAVE_METHODS:
            raise ArgumentError(f"save_method={save_method!r} is not known; use one of {', '.join(_SAVE_METHODS)}.")
        if save_method == "lora":
            self.save_pretrained(str(save_directory))
            return Path(save_directory)
        return save_merged(self, save_directory, dtype=self._merged_dtype(save_method, dtype))

    def save_pretrained_gguf(
        self,
        save_directory: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        quantization_method: str | Sequence[str] = "q8_0",
    ) -> list[Path]:
        """Write the merged model as GGUF for llama.cpp, one file per quantisation ("f32", "f16", "bf16", "q8_0").

        The files appear together, once each was read back and compared with this model.

        Raises:
            ArgumentError: an unknown quantisation.
            ExportError: llama.cpp has no such architecture or pooling; the message says which.
        """
        self._own_tokenizer(tokenizer)
        methods = [quantization_method] if isinstance(quantization_method, str) else list(quantization_method)
        return save_gguf(self, save_directory, methods)

    def save_pretrained_torchao(
        self,
        save_directory: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        torchao_config: str = "int8_weight_only",
    ) -> Path:
        """Write the merged model with torchao's 8-bit weights; plain sentence-transformers loads it where torchao is.

        Args:
            torchao_config: "int8_weight_only", or "int8_dynamic" for 8-bit activations too.
        """
        self._own_tokenizer(tokenizer)
        return save_torchao(self, save_directory, scheme=torchao_config)

    def save_pretrained_onnx(
        self,
        save_directory: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        quantization_method: str = "f32",
    ) -> Path:
        """Write the merged model as an ONNX graph whose output is the embedding, checked through onnxruntime.

        Args:
            quantization_method: "f32", or "int8" for a quarter of the size.

        Raises:
            MissingPackageError: onnx, onnxscript or onnxruntime is not installed.
            ExportError: the model cannot be a graph, or loses too much; nothing is left behind.
        """
        self._own_tokenizer(tokenizer)
        return save_onnx(self, save_directory, quantization=quantization_method)

    def save_pretrained_openvino(
        self,
        save_directory: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        quantization_method: str = "f32",
    ) -> Path:
        """Write the merged model for OpenVINO, its output the embedding, checked through OpenVINO.

        Args:
            quantization_method: "f32", or "f16" for half the size.

        Raises:
            MissingPackageError: openvino, onnx or onnxscript is not installed.
            ExportError: the model cannot be a graph; nothing is left behind.
        """
        self._own_tokenizer(tokenizer)
        return save_openvino(self, save_directory, quantization=quantization_method)

    def push_to_hub_merged(
        self,
        repo_id: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        save_method: str = "merged",
        *,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str = "Add the merged sentence-transformers model",
        revision: str | None = None,
    ) -> str:
        """Write the merged model and upload it; returns the address. Every failure of the Hub is raised."""
        self.model_card_data.set_model_id(repo_id)
        with tempfile.TemporaryDirectory() as folder:
            saved = self.save_pretrained_merged(Path(folder) / "model", tokenizer, save_method)
            return push_folder(
                saved, repo_id, token=token, private=private, commit_message=commit_message, revision=revision
            )

    def push_to_hub_gguf(
        self,
        repo_id: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        quantization_method: str | Sequence[str] = "q8_0",
        *,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str = "Add GGUF files",
        revision: str | None = None,
    ) -> str:
        """Write GGUF files and upload them; returns the address. Every failure of the Hub is raised."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained_gguf(folder, tokenizer, quantization_method)
            return push_folder(
                Path(folder), repo_id, token=token, private=private, commit_message=commit_message, revision=revision
            )

    def _own_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        if tokenizer is not None and tokenizer is not self.tokenizer:
            raise ArgumentError("tokenizer: the model's own is saved; to change it, set model.tokenizer first.")

    def _merged_dtype(self, save_method: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
        if dtype is not None:
            return runtime.choose_dtype(dtype, self.device).dtype
        if save_method == "merged_16bit":
            compute = transformer_modules(self)[0].model.dtype
            return compute if compute in (torch.float16, torch.bfloat16) else torch.float16
        return torch.float32 if save_method == "merged_32bit" else None


class FastModel:
    """The lower door: a bare encoder and its tokenizer, for those who build the SentenceTransformer themselves."""

    @staticmethod
    def from_pretrained(
        model_name: str | Path,
        auto_model: Any = None,
        max_seq_length: int | None = None,
        dtype: torch.dtype | str | None = None,
        load_in_16bit: bool = False,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        full_finetuning: bool = False,
        add_pooling_layer: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str | None = False,
        random_state: int = 3407,
        attn_implementation: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        engine: str = "auto",
        **unsupported: Any,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load an encoder with the class `auto_model` (None: the checkpoint's own) and its tokenizer.

        Args:
            add_pooling_layer: passed on where the class knows it, dropped where it does not.
            Others as in `FastSentenceTransformer.from_pretrained`.

        Raises:
            ArgumentError: an argument is unknown, or contradicts another; the message names it.
            ModelError: nothing loadable is found under that name, or it is an adapter folder.
        """
        refuse_unknown(unsupported, _parameters(FastModel.from_pretrained))
        source = _source(model_name, revision, token, cache_dir, local_files_only, trust_remote_code)
        base = adapter_base(source)
        if full_finetuning and base:
            raise ArgumentError("full_finetuning and an adapter folder exclude each other.")
        settings, weights = _settings(
            device=device,
            dtype=dtype,
            load_in_16bit=load_in_16bit,
            load_in_8bit=load_in_8bit,
            load_in_4bit=load_in_4bit,
            full_finetuning=full_finetuning,
            max_seq_length=max_seq_length,
            attn_implementation=attn_implementation,
            model_kwargs=model_kwargs or {},
            processor_kwargs=processor_kwargs or {},
        )
        notes = LoadNotes(
            name=str(model_name),
            weights=weights,
            engine=engine,
            attn_implementation=attn_implementation,
            full_finetuning=full_finetuning,
            gradient_checkpointing=use_gradient_checkpointing,
        )
        with runtime.seeded(random_state, settings.device):
            backbone, tokenizer = load.load_backbone(
                source if base is None else source.renamed(base), settings, auto_model, add_pooling_layer
            )
        backbone.load_notes = notes
        _prepare(backbone, notes)
        if full_finetuning:
            save_verified(backbone)
        if base is not None:
            folder = local_folder(source)
            saved = load.saved_tokenizer(folder, backbone, settings.processor_kwargs, trust_remote_code)
            tokenizer = saved or tokenizer
            backbone = continue_adapter(backbone, folder, trainable=True)
        length = clamp_length(max_seq_length, backbone.config) or position_limit(backbone.config)
        if length is not None:
            tokenizer.model_max_length = min(length, tokenizer.model_max_length if max_seq_length is None else length)
        return backbone, tokenizer

    @staticmethod
    def get_peft_model(
        model: PreTrainedModel,
        r: int = 16,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        target_modules: str | Sequence[str] | None = None,
        bias: str = "none",
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        loftq_config: Mapping[str, Any] | None = None,
        layers_to_transform: int | Sequence[int] | None = None,
        modules_to_save: Sequence[str] | None = None,
        random_state: int = 3407,
        task_type: Any = "FEATURE_EXTRACTION",
        use_gradient_checkpointing: bool | str | None = None,
        **unsupported: Any,
    ) -> AdaptedEncoder:
        """Put LoRA adapters on an encoder; the returned model merges and saves itself whole (see `AdaptedEncoder`).

        Raises:
            ArgumentError: an argument is unknown or does not fit the model; the message names it.
            ModelError: the model has an adapter already, or is a SentenceTransformer.
        """
        refuse_unknown(unsupported, _parameters(FastModel.get_peft_model))
        if not isinstance(model, PreTrainedModel | PeftModel):
            raise ModelError(
                f"FastModel.get_peft_model needs a transformers encoder, not {type(model).__name__}; "
                "for a SentenceTransformer use FastSentenceTransformer.get_peft_model."
            )
        settings = _lora_settings(locals())
        notes = getattr(model, "load_notes", None)
        if use_gradient_checkpointing is None and notes is not None:
            use_gradient_checkpointing = notes.gradient_checkpointing
        return _adapt(model, settings, use_gradient_checkpointing)

    @staticmethod
    def as_sentence_transformer(
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        base_model_id: str | Path | None = None,
        pooling_mode: str | None = "cls",
        max_seq_length: int | None = None,
    ) -> FastSentenceTransformer:
        """Wrap an encoder, adapted or not, as a SentenceTransformer: Transformer, Pooling, Normalize.

        Args:
            model: from `from_pretrained` or `get_peft_model`; it is used as it is, not copied.
            base_model_id: where the encoder's config is read from; None is the checkpoint it was loaded from.
            pooling_mode: None takes the family's own.
            max_seq_length: None keeps the tokenizer's; more than the model's positions is cut with a warning.
        """
        if pooling_mode is not None and pooling_mode not in load.POOLING_MODES:
            raise ArgumentError(f"pooling_mode={pooling_mode!r} is not known; use {', '.join(load.POOLING_MODES)}.")
        base = str(base_model_id or model.config._name_or_path)
        length = clamp_length(max_seq_length, model.config)
        if length is not None:
            tokenizer.model_max_length = length
        transformer = load.wrap_backbone(model, tokenizer, base)
        device = next(model.parameters()).device
        source = getattr(unwrapped(model), "load_source", None)
        wrapped = FastSentenceTransformer(
            modules=load.sentence_modules(transformer, pooling_mode),
            device=str(device),
            trust_remote_code=source is not None and source.trust_remote_code,
        )
        keep_heads_in_float32(wrapped)
        notes = getattr(model, "load_notes", None)
        wrapped.load_notes = notes
        asked = (notes.engine, notes.attn_implementation) if notes else ("auto", None)
        wrapped.engine = choose_engine(asked[0], wrapped, asked[1])
        return wrapped


def _source(
    model_name: str | Path,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
    trust_remote_code: bool,
) -> Source:
    return Source(
        name=str(Path(model_name).expanduser()),
        revision=revision,
        token=token,
        cache_dir=None if cache_dir is None else str(cache_dir),
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
    )


def _settings(
    *,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
    load_in_16bit: bool,
    load_in_8bit: bool,
    load_in_4bit: bool,
    full_finetuning: bool,
    **others: Any,
) -> tuple[load.Settings, Weights]:
    place = runtime.default_device() if device is None else torch.device(device)
    weights = choose_weights(
        dtype=dtype,
        load_in_16bit=load_in_16bit,
        load_in_8bit=load_in_8bit,
        load_in_4bit=load_in_4bit,
        full_finetuning=full_finetuning,
        device=place,
    )
    quantization = quantization_config(weights.bits, place, weights.dtype) if weights.bits else None
    return load.Settings(dtype=weights.dtype, device=place, quantization=quantization, **others), weights


def _are_texts(inputs: Any) -> bool:
    texts = inputs.tolist() if isinstance(inputs, np.ndarray) else inputs
    return isinstance(texts, str) or (isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts))


def _prepare(backbone: PreTrainedModel, notes: LoadNotes) -> None:
    """Freeze or free the weights, ready a quantised base for training, and switch checkpointing as asked."""
    backbone.requires_grad_(notes.full_finetuning)
    if notes.weights.bits is not None:
        prepare_quantised_base(backbone)
    enable_gradient_checkpointing(backbone, notes.gradient_checkpointing)


def _adapt(backbone: PreTrainedModel, settings: LoraSettings, checkpointing: bool | str | None) -> AdaptedEncoder:
    adapted = attach_lora(backbone, settings)
    if checkpointing is not None:
        enable_gradient_checkpointing(adapted, checkpointing)
    return adapted


def _lora_settings(arguments: Mapping[str, Any]) -> LoraSettings:
    names = LoraSettings.__dataclass_fields__
    return LoraSettings(**{name: value for name, value in arguments.items() if name in names})


def _parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("cls", "model", "unsupported")]
