"""A batch as one flat row of real tokens: its layout, its attention masks, attention over it and pooling."""
