"""BERT and its variants RoBERTa, XLM-RoBERTa and DistilBERT in Flax, whose sizes may differ from layer to layer."""
