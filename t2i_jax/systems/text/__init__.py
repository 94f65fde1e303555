"""Text encoders as systems, for others to be built on."""
