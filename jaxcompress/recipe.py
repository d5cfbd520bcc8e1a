"""Declared pipelines: recipes, the texts that they need, the loops that run them."""

from jaxcompress._src.recipe.compress import compress as compress
from jaxcompress._src.recipe.directories import load_model as load_model
from jaxcompress._src.recipe.predict import predict as predict
from jaxcompress._src.recipe.recipe import read_recipe as read_recipe
from jaxcompress._src.recipe.steps import Training as Training
from jaxcompress._src.recipe.text import Texts as Texts
from jaxcompress._src.recipe.tokens import Tokens as Tokens
from jaxcompress._src.recipe.tokens import tokenize as tokenize
from jaxcompress._src.recipe.train import train as train
