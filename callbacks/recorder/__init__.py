"""Parts of `callbacks.dynamics`: ids of training examples, test examples, and ways to measure them."""
