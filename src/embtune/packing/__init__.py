"""A batch as one flat row of real tokens: layout, attention over it, and the swaps that some architectures need."""
