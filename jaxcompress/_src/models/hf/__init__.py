"""Files of Hugging Face, of any family."""
