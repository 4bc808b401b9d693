"""Emitters: from a loop's pieces to source that is read by people."""
