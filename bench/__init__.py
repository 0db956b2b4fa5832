"""How fast, and in how much memory: TRL's trainers as they come, TRL's tuned, and ours, in one interleaved run."""
