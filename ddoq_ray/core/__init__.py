"""Pure numerics: arrays in, arrays out. No Ray, no input or output, no global random state.

`rng` keyed generators; `clvq` streaming quantization; `gram_kmeans` exact quantization of one class;
`baselines` the algorithms others use; `distortion` assignment, distortion and exact Wasserstein distance.
"""
