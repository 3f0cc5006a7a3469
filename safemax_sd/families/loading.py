"""Loading of a base model by the family for its pipeline class."""

from __future__ import annotations

from dataclasses import replace

from safemax_sd.assets import resolve_model
from safemax_sd.core.errors import OptionError
from safemax_sd.families.base import FAMILIES, LoadOptions, ModelFamily
from safemax_sd.families.folders import OPTION
from safemax_sd.families.single_file import CONFIG_OPTION, is_single_file, with_configuration


def load_family(options: LoadOptions) -> ModelFamily:
    """Load a model with the family for the pipeline class in its `model_index.json`.

    Raises:
        OptionError: The model does not exist or cannot be loaded, or no family has its pipeline class.
    """
    family, located = find_family(options)
    loaded = family.load(located)
    loaded.options = replace(
        options, single_file_config=located.single_file_config, missing_parts=located.missing_parts
    )
    return loaded


def find_family(options: LoadOptions) -> tuple[type[ModelFamily], LoadOptions]:
    """Return the family of a model, and the options with a single file's configuration; no weights are loaded.

    Raises:
        OptionError: The model does not exist, or no family has its pipeline class.
    """
    located = with_configuration(options) if is_single_file(options.name_or_path) else options
    class_name = _pipeline_class(located)
    supported: list[str] = []
    for name in FAMILIES.names():
        family = FAMILIES.get(name)
        if class_name in family.pipeline_classes:
            return family, located
        supported += sorted(family.pipeline_classes)
    raise OptionError(OPTION, options.name_or_path, f"is a {class_name}; supported: {', '.join(supported)}")


def _pipeline_class(options: LoadOptions) -> str | None:
    """Return the pipeline class in the `model_index.json` of a model, or of a single file's configuration.

    Raises:
        OptionError: The model does not exist.
    """
    from diffusers import DiffusionPipeline

    if options.single_file_folder is not None:
        path = str(options.single_file_folder)
    elif options.single_file_config is None:
        path = resolve_model(options.name_or_path)
    else:
        text = f"goes with a single file (.safetensors), which {options.name_or_path} is not"
        raise OptionError(CONFIG_OPTION, options.single_file_config, text)
    try:
        config = DiffusionPipeline.load_config(path, revision=options.revision, cache_dir=options.cache_dir)
        class_name = config.get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        text = (
            "must be a diffusers model folder, a single .safetensors file, a hub id or an embedded model's name (emoji)"
        )
        raise OptionError(OPTION, options.name_or_path, text) from error
    if isinstance(class_name, list):  # a custom class, after the file that defines it
        class_name = class_name[-1] if class_name else None
    return class_name
