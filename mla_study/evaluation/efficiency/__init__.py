"""The efficiency study: how fast, how much memory, and what of it is window, layout or form."""
