"""The six-step guide to fine-tuning a bi-encoder, on embtune: load, LoRA, wrap, train, evaluate, merge and save.

    python examples/guide.py --data pairs.jsonl                       # a GPU, the guide's own settings
    python examples/guide.py --data pairs.jsonl --model DIR --cpu     # a laptop: few steps, small batches

`pairs.jsonl` holds one {"anchor": …, "positive": …} a line.
"""

import argparse
import os

os.environ["UNSLOTH_DISABLE_FAST_GENERATION"] = "1"  # the guide's first line; embtune has no such kernels to disable

import torch
from datasets import concatenate_datasets, load_dataset
from peft import TaskType
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from sentence_transformers.util import cos_sim
from transformers import BertModel

from embtune import FastModel, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from embtune.losses import MultipleNegativesRankingLoss

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="JSONL with anchor and positive")
parser.add_argument("--model", default="Snowflake/snowflake-arctic-embed-l", help="folder or Hub name of a BERT model")
parser.add_argument("--output", default=".", help="folder for the run and the saved models")
parser.add_argument("--test-size", type=int, default=4096, help="pairs kept for evaluation")
parser.add_argument("--report-to", default="none", help="tracker, such as wandb")
parser.add_argument("--cpu", action="store_true", help="few steps and small batches in float32")
options = parser.parse_args()

BASE_MODEL_ID = options.model
MAX_SEQ_LENGTH = 2048

# 2. Load a base embedding model. A length beyond the model's positions is clamped, with a warning.
model, tokenizer = FastModel.from_pretrained(
    model_name=BASE_MODEL_ID,
    auto_model=BertModel,
    max_seq_length=MAX_SEQ_LENGTH,
    dtype=None,
    add_pooling_layer=False,
)

# 3. Add LoRA adapters for feature extraction.
model = FastModel.get_peft_model(
    model,
    r=8,
    lora_alpha=8,
    lora_dropout=0.0,
    target_modules=["query", "key", "value", "dense"],
    bias="none",
    use_gradient_checkpointing="unsloth",
    task_type=TaskType.FEATURE_EXTRACTION,
)

# 4. Wrap as a SentenceTransformer: Transformer, Pooling, Normalize.
sbert_model = FastModel.as_sentence_transformer(
    model,
    tokenizer,
    base_model_id=BASE_MODEL_ID,
    pooling_mode="cls",
    max_seq_length=tokenizer.model_max_length,
)

# 5. Train with MultipleNegativesRankingLoss.
loss = MultipleNegativesRankingLoss(sbert_model)

dataset = load_dataset("json", data_files=options.data, split="train")
dataset = dataset.map(lambda x, idx: {"id": str(idx)}, with_indices=True)
dataset = dataset.shuffle(seed=42)

split_dataset = dataset.train_test_split(test_size=options.test_size, seed=42)
train_dataset = split_dataset["train"]
validation_dataset = split_dataset["test"]

corpus_dataset = concatenate_datasets([train_dataset, validation_dataset])
corpus = dict(zip(corpus_dataset["id"], corpus_dataset["positive"], strict=True))
queries = dict(zip(validation_dataset["id"], validation_dataset["anchor"], strict=True))
relevant_docs = {qid: [qid] for qid in queries}

evaluator = InformationRetrievalEvaluator(
    queries=queries,
    corpus=corpus,
    relevant_docs=relevant_docs,
    score_functions={"cosine": cos_sim},
    name="ir-eval",
)

bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
hardware = (
    {"use_cpu": True, "max_steps": 4, "eval_steps": 2, "save_steps": 2, "per_device_eval_batch_size": 32}
    if options.cpu
    else {
        "fp16": not bf16,
        "bf16": bf16,
        "tf32": True,
        "fp16_full_eval": True,
        "eval_steps": 1000,
        "save_steps": 1000,
        "per_device_eval_batch_size": 1024,
    }
)
args = SentenceTransformerTrainingArguments(
    output_dir=f"{options.output}/embeddings_run",
    num_train_epochs=1,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=1,
    learning_rate=2e-5,
    lr_scheduler_type="constant_with_warmup",
    warmup_ratio=0.1,
    weight_decay=0.01,
    optim="adamw_torch_fused",
    batch_sampler=BatchSamplers.NO_DUPLICATES,
    eval_strategy="steps",
    save_strategy="steps",
    save_total_limit=20,
    load_best_model_at_end=True,
    metric_for_best_model="eval_ir-eval_cosine_ndcg@10",
    greater_is_better=True,
    logging_steps=10,
    report_to=options.report_to,
    run_name=f"{BASE_MODEL_ID.split('/')[-1]}-st-finetune",
    seed=42,
    max_grad_norm=1.0,
    **hardware,
)

trainer = SentenceTransformerTrainer(
    model=sbert_model,
    args=args,
    train_dataset=train_dataset.select_columns(["anchor", "positive"]),
    eval_dataset=validation_dataset.select_columns(["anchor", "positive"]),
    loss=loss,
    evaluator=evaluator,
)

trainer.train()

# 6. Merge the adapters into the encoder, then save: the whole SentenceTransformer, and the plain encoder elsewhere.
model.merge_and_unload()
sbert_model.save_pretrained(f"{options.output}/embeddings_merged")

model.save_pretrained(f"{options.output}/embeddings_merged_hf")
tokenizer.save_pretrained(f"{options.output}/embeddings_merged_hf")
