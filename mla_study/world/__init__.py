"""The procedural miniature: a world of captions and clips that trains on a laptop's CPU.

``grammar`` says what can be told, ``scenes`` where things are, ``render`` how they look, ``parser``
reads a video back without its caption, and ``score`` compares.
"""
