"""The stages, one file each: where work and state are placed on Ray. Formulas are in core/, networks in models/."""
