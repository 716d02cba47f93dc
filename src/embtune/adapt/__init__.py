"""LoRA on PEFT, quantised bases, and the merge of both."""
