"""An LSTM over characters."""
