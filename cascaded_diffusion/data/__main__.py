"""`python -m cascaded_diffusion.data`: see `show_data`."""

from cascaded_diffusion.commands import entry, show_data

if __name__ == "__main__":
    entry.run(show_data.main)
