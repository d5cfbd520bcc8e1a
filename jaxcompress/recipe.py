"""Declared pipelines on text classifiers: recipes, data, the loops that run them."""

from jaxcompress._src.recipe.assets import MINILM as MINILM
from jaxcompress._src.recipe.assets import MOVIE_REVIEWS as MOVIE_REVIEWS
from jaxcompress._src.recipe.assets import Asset as Asset
from jaxcompress._src.recipe.assets import cache_directory as cache_directory
from jaxcompress._src.recipe.assets import fetch as fetch
from jaxcompress._src.recipe.compress import compress as compress
from jaxcompress._src.recipe.directories import load_model as load_model
from jaxcompress._src.recipe.directories import save_huggingface as save_huggingface
from jaxcompress._src.recipe.images import Images as Images
from jaxcompress._src.recipe.images import fashion_mnist as fashion_mnist
from jaxcompress._src.recipe.images import mnist_5k as mnist_5k
from jaxcompress._src.recipe.minilm import fine_tuned_minilm as fine_tuned_minilm
from jaxcompress._src.recipe.predict import predict as predict
from jaxcompress._src.recipe.predict import predictor as predictor
from jaxcompress._src.recipe.progress import Progress as Progress
from jaxcompress._src.recipe.recipe import read_recipe as read_recipe
from jaxcompress._src.recipe.steps import Training as Training
from jaxcompress._src.recipe.text import Split as Split
from jaxcompress._src.recipe.text import Texts as Texts
from jaxcompress._src.recipe.text import rotten_tomatoes as rotten_tomatoes
from jaxcompress._src.recipe.tokens import Tokens as Tokens
from jaxcompress._src.recipe.tokens import evaluation_batches as evaluation_batches
from jaxcompress._src.recipe.tokens import tokenize as tokenize
from jaxcompress._src.recipe.train import model_apply as model_apply
from jaxcompress._src.recipe.train import train as train
