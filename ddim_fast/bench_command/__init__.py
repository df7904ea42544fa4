"""`ddim-fast bench`: the engines and their peers side by side, timed only where their pictures agree."""
