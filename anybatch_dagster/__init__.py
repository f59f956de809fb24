"""anybatch on Dagster: assets whose batches take hours, with no run alive meanwhile."""

from dagster_shared.libraries import DagsterLibraryRegistry

from anybatch import __version__

from .assets import BatchAssets, SubmitConfig, batch_asset, build_batch_assets
from .component import BatchAssetComponent
from .external import build_external_batch_sensor
from .resource import BatchResource
from .sensor import build_batch_sensor

__all__ = [
    "BatchAssetComponent",
    "BatchAssets",
    "BatchResource",
    "SubmitConfig",
    "__version__",
    "batch_asset",
    "build_batch_assets",
    "build_batch_sensor",
    "build_external_batch_sensor",
]

DagsterLibraryRegistry.register("anybatch-dagster", __version__, is_dagster_package=False)
