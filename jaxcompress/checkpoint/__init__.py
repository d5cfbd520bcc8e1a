"""Checkpoints that restore from their path alone: Orbax arrays beside one JSON manifest."""

from jaxcompress.checkpoint._errors import CheckpointError as CheckpointError
from jaxcompress.checkpoint._manifest import FORMAT_VERSION as FORMAT_VERSION
from jaxcompress.checkpoint._manifest import FileRecord as FileRecord
from jaxcompress.checkpoint._manifest import LeafRecord as LeafRecord
from jaxcompress.checkpoint._manifest import Manifest as Manifest
from jaxcompress.checkpoint._manifest import StoredValue as StoredValue
from jaxcompress.checkpoint._manifest import StructureNode as StructureNode
from jaxcompress.checkpoint._read import read_manifest as read_manifest
from jaxcompress.checkpoint._restore import RestoreInfo as RestoreInfo
from jaxcompress.checkpoint._restore import restore as restore
from jaxcompress.checkpoint._save import save as save
