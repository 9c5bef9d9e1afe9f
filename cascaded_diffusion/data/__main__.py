"""`python -m cascaded_diffusion.data`: see `show_data`."""

from cascaded_diffusion.commands import cli, show_data

if __name__ == "__main__":
    cli.run(show_data.main)
