"""The lessons' sources, what draws in them, and what makes notebooks of them."""

import warnings

# tqdm misses a package for bars in notebooks, and says so in the first lesson that anybody opens
warnings.filterwarnings("ignore", message="IProgress not found")
