"""The stages, one file each: where work and state are placed on Ray. The formulas are in core/, the networks in models/."""
