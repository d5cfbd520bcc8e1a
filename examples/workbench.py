"""What the examples use of the inside of the library: data, a fine-tuned model, batches.

None of it is a part of the public interface.
"""

import sys

from jaxcompress._src.recipe.assets import BROWN as BROWN
from jaxcompress._src.recipe.assets import MINILM as MINILM
from jaxcompress._src.recipe.assets import MOVIE_REVIEWS as MOVIE_REVIEWS
from jaxcompress._src.recipe.assets import SMOLLM2 as SMOLLM2
from jaxcompress._src.recipe.assets import Asset as Asset
from jaxcompress._src.recipe.assets import cache_directory as cache_directory
from jaxcompress._src.recipe.assets import fetch as fetch
from jaxcompress._src.recipe.brown import brown as brown
from jaxcompress._src.recipe.images import Images as Images
from jaxcompress._src.recipe.images import fashion_mnist as fashion_mnist
from jaxcompress._src.recipe.images import mnist_5k as mnist_5k
from jaxcompress._src.recipe.minilm import fine_tuned_minilm as fine_tuned_minilm
from jaxcompress._src.recipe.predict import predictor as predictor
from jaxcompress._src.recipe.progress import Progress as Progress
from jaxcompress._src.recipe.text import Split as Split
from jaxcompress._src.recipe.text import rotten_tomatoes as rotten_tomatoes
from jaxcompress._src.recipe.tokens import evaluation_batches as evaluation_batches
from jaxcompress._src.recipe.train import model_apply as model_apply
from jaxcompress._src.report.disk import disk_bytes as disk_bytes
from jaxcompress._src.report.mean import sample_mean as sample_mean
from jaxcompress._src.report.table import Table as Table
from jaxcompress._src.report.table import format_table as format_table
from jaxcompress._src.tree.unselected import is_unselected as is_unselected


def note(text: str) -> None:
    """One line to the user, beside the results."""
    print(text, file=sys.stderr, flush=True)
