"""Llama, and what differs from it by its config only: Mistral, Qwen 2 and 3, SmolLM2."""
