"""Views: crop, flip, CutMix, MixUp, shuffled patches and cutout as a pure function of (seed, epoch, image_id).

A soft label is only right for the exact pixels the teacher saw, so the teacher (label stage) and the student
(train stage) must render the same view of an image from its key alone: whatever the batch, the worker or the
order.

- Parameters are drawn on the CPU in float64. Each row has its own counter-based stream (Philox4x64-10, the
  generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), evaluated for all rows
  at once.
- Pixels are rendered by torch on the device that holds the images, row by row independent of each other.

Shapes: B views of a batch, N images of the set, H W stored image, S side of the view.
"""
