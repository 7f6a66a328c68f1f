"""The trainable depth: what trained networks show of it, in numbers, words, a figure and a page."""
