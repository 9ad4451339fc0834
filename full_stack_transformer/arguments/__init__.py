"""The options of every command, by stage: a frozen dataclass each. Standard library only."""
