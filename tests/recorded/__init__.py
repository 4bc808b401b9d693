"""Saved ops of each format, with calls of them: later versions read these, or have another format."""
