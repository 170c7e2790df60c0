"""Pictures and tars: samples, image sets, collections; no Ray."""
