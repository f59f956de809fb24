"""anybatch on Dagster: assets whose batches take hours, while no run process is alive.

Where things are:

    assets                @batch_asset and build_batch_assets: a submit asset, a result asset and a check
    submit_step           what the submit asset does when it runs
    collect_step          what the result asset does when it runs
    steps                 what both steps share: the job's identity and folder, its record, errors
    options, inputs       a batch asset's options; the function's return value as request lines
    values, metadata      the result asset's value; the metadata on materializations
    resource              BatchResource: the account
    component…            BatchAssetComponent: a batch asset in YAML; its schema and its scaffolder
    gate                  how a run waits in the queue without a process
    sensor                build_batch_sensor: looks at batches, and lets waiting runs start
    pending               what the sensor waits for: parked runs and submissions
    submissions           finds submissions and their runs in Dagster's event log
    polling               looks at many batches within the time of one tick
    abandoned             batches that no run will collect: a person ended the run, or the asset is gone
    external              build_external_batch_sensor: batches that other systems created
"""

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
