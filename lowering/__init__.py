"""From a declared loop to a fast, differentiable op, stage by stage: `pipeline` lists them."""

if __name__ != "nestloop.lowering":
    raise ImportError(
        f"imported as {__name__!r}: this folder is nestloop.lowering. Write `import nestloop.lowering`, and do not "
        "put the folder that holds it on sys.path under another name."
    )
