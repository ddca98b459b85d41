"""The subcommands of ``mla-study``, one dataclass each: thin calls into the library."""
