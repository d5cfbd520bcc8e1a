"""Low-rank leaves: factors by activations or Fisher information, and how many directions each leaf keeps."""
