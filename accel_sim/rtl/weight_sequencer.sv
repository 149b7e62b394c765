// Walks the folds of a weight-stationary product: K in steps of ROWS inside N in steps of COLUMNS.
//
// A loader puts the ROWS x COLUMNS weights of a fold into the array's chains, bottom row first; a streamer sends the M
// rows of operands past them. With WEIGHT_SHADOW the loader takes up the next fold in the cycle in which the streamer
// begins the present one (the operands' `first` flag frees each chain just before it moves), and a stream begins as
// soon as the one before it has been sent and its own weights are there. Without, the loader waits until the last result
// of the present fold is being written.
module weight_sequencer #(
    parameter ROWS = 4,
    parameter COLUMNS = 4,
    parameter WEIGHT_SHADOW = 1,
    parameter DIM_BITS = 16,
    parameter ADDRESS_BITS = 20
) (
    input  logic                    clk,
    input  logic                    reset,
    input  logic                    start,             // the first weights enter in this very cycle
    input  logic [    DIM_BITS-1:0] m,
    input  logic [    DIM_BITS-1:0] k,
    input  logic [    DIM_BITS-1:0] n,
    input  logic                    fold_written,
    // left operands: word `left_address` of the memory, of which `left_lanes` lanes count (more than ROWS: all)
    output logic                    left_valid,
    output logic [ADDRESS_BITS-1:0] left_address,
    output logic [    DIM_BITS-1:0] left_lanes,
    output logic                    first,
    output logic                    last,
    // top operands
    output logic                    top_valid,
    output logic [ADDRESS_BITS-1:0] top_address,
    output logic [    DIM_BITS-1:0] top_lanes,
    output logic [        ROWS-1:0] shift,
    // the row of results that this cycle's operands lead to
    output logic                    result_valid,
    output logic [ADDRESS_BITS-1:0] result_address,
    output logic                    result_accumulate,
    output logic                    result_ends_fold,
    output logic                    result_ends_all
);
  localparam [DIM_BITS-1:0] R = ROWS[DIM_BITS-1:0];
  localparam [DIM_BITS-1:0] C = COLUMNS[DIM_BITS-1:0];
  localparam [DIM_BITS-1:0] ZERO = 0;
  localparam [DIM_BITS-1:0] ONE = 1;
  localparam FILL = ADDRESS_BITS - DIM_BITS;

  // the loader: fold (load_k, load_n), word load_step of ROWS
  logic [DIM_BITS-1:0] load_k, load_n, load_step;
  logic [ADDRESS_BITS-1:0] load_base;  // of the words of these columns
  logic load_busy, load_more, weights_ready, restart;
  wire load_start = start || (load_more && (WEIGHT_SHADOW != 0 ? stream_start : restart));
  wire load_go = load_start || load_busy;
  wire load_end = load_go && load_step == R - ONE;
  wire load_last_k = k - load_k <= R;
  wire load_last = load_last_k && n - load_n <= C;
  wire [DIM_BITS-1:0] load_row = load_k + (R - ONE - load_step);

  // the streamer: fold (stream_k, stream_n), operand stream_step of M
  logic [DIM_BITS-1:0] stream_k, stream_n, stream_step;
  logic [ADDRESS_BITS-1:0] stream_base, result_base;
  logic stream_busy;
  wire stream_start = weights_ready && !stream_busy;
  wire stream_go = stream_start || stream_busy;
  wire stream_end = stream_go && stream_step == m - ONE;
  wire stream_last_k = k - stream_k <= R;
  wire stream_last = stream_last_k && n - stream_n <= C;

  always_ff @(posedge clk) begin
    if (reset) begin
      load_k <= ZERO;
      load_n <= ZERO;
      load_step <= ZERO;
      load_base <= 0;
      load_busy <= 1'b0;
      load_more <= 1'b0;
      weights_ready <= 1'b0;
      restart <= 1'b0;
      stream_k <= ZERO;
      stream_n <= ZERO;
      stream_step <= ZERO;
      stream_base <= 0;
      result_base <= 0;
      stream_busy <= 1'b0;
    end else begin
      restart <= fold_written;
      load_busy <= load_go && !load_end;
      if (load_go) load_step <= load_end ? ZERO : load_step + ONE;
      if (load_end) begin
        load_more <= !load_last;
        load_k <= load_last_k ? ZERO : load_k + R;
        if (load_last_k) begin
          load_n <= load_last ? ZERO : load_n + C;
          load_base <= load_last ? 0 : load_base + {{FILL{1'b0}}, k};
        end
      end
      if (load_end) weights_ready <= 1'b1;
      else if (stream_start) weights_ready <= 1'b0;

      stream_busy <= stream_go && !stream_end;
      if (stream_go) stream_step <= stream_end ? ZERO : stream_step + ONE;
      if (stream_end) begin
        stream_k <= stream_last_k ? ZERO : stream_k + R;
        stream_base <= stream_last_k ? 0 : stream_base + {{FILL{1'b0}}, m};
        if (stream_last_k) begin
          stream_n <= stream_last ? ZERO : stream_n + C;
          result_base <= stream_last ? 0 : result_base + {{FILL{1'b0}}, m};
        end
      end
    end
  end

  assign left_valid = stream_go;
  assign left_address = stream_base + {{FILL{1'b0}}, stream_step};
  assign left_lanes = k - stream_k;
  assign first = stream_go && stream_step == ZERO;
  assign last = 1'b0;

  assign top_valid = load_go && load_row < k;  // the rows beyond K of an edge fold are zero
  assign top_address = load_base + {{FILL{1'b0}}, load_row};
  assign top_lanes = n - load_n;
  genvar r;
  generate
    for (r = 0; r < ROWS; r = r + 1) begin : row
      localparam [DIM_BITS-1:0] ROW = r[DIM_BITS-1:0];
      assign shift[r] = load_go && load_step >= ROW;
    end
  endgenerate

  assign result_valid = stream_go;
  assign result_address = result_base + {{FILL{1'b0}}, stream_step};
  assign result_accumulate = stream_k != ZERO;
  assign result_ends_fold = stream_end;
  assign result_ends_all = stream_end && stream_last;
endmodule
