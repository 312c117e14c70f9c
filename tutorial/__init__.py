"""The lessons' sources, what draws in them, and what makes notebooks of them."""

import os
import warnings

# Threads that spin while they wait for each other make a small model 100 times as slow when a training runs beside the
# lesson, as lesson 0 proposes. OpenMP reads this when torch is imported, so lessons import `tutorial` first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# tqdm misses a package for bars in notebooks, and says so in the first lesson that anybody opens
warnings.filterwarnings("ignore", message="IProgress not found")
