"""What a run would take, before it begins: memory, disk. Formulas of memory are those by which training decides."""
