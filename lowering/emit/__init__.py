"""Emitters: from a loop's pieces to source that is read by people."""

CALLED = ("elements.py", "tiles.py")  # files of this folder that generated Triton imports
