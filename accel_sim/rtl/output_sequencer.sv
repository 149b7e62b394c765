// Walks the folds of an output-stationary product: M in steps of ROWS inside N in steps of COLUMNS.
//
// A fold's K pairs of operands enter; ROWS cycles after the last pair the bottom row's sums of column 0 are complete and
// the drain takes a row of results a cycle, bottom row first. With DRAIN_OVERLAP a fold begins as soon as the operands
// of the one before it have been sent, but no less than ROWS cycles after it, which is how long a drain takes. Without,
// it waits until the last result of the one before it is being written.
module output_sequencer #(
    parameter ROWS = 4,
    parameter COLUMNS = 4,
    parameter DRAIN_OVERLAP = 1,
    parameter DIM_BITS = 16,
    parameter ADDRESS_BITS = 20
) (
    input  logic                    clk,
    input  logic                    reset,
    input  logic                    start,             // the first operands enter in this very cycle
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
    // the row of results whose sums are at the bottom of column 0
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

  // the streamer: fold (fold_m, fold_n), operand pair step of K
  logic [DIM_BITS-1:0] fold_m, fold_n, step, spacing;
  logic [ADDRESS_BITS-1:0] left_base, top_base, result_base;
  logic stream_busy, more, restart;
  wire stream_start = start || (more && (DRAIN_OVERLAP != 0 ? !stream_busy && spacing == ZERO : restart));
  wire stream_go = stream_start || stream_busy;
  wire stream_end = stream_go && step == k - ONE;
  wire last_m = m - fold_m <= R;
  wire last_fold = last_m && n - fold_n <= C;

  always_ff @(posedge clk) begin
    if (reset) begin
      fold_m <= ZERO;
      fold_n <= ZERO;
      step <= ZERO;
      spacing <= ZERO;
      left_base <= 0;
      top_base <= 0;
      result_base <= 0;
      stream_busy <= 1'b0;
      more <= 1'b0;
      restart <= 1'b0;
    end else begin
      restart <= fold_written;
      spacing <= stream_start ? R - ONE : (spacing == ZERO ? ZERO : spacing - ONE);
      stream_busy <= stream_go && !stream_end;
      if (stream_go) step <= stream_end ? ZERO : step + ONE;
      if (stream_end) begin
        more <= !last_fold;
        fold_m <= last_m ? ZERO : fold_m + R;
        left_base <= last_m ? 0 : left_base + {{FILL{1'b0}}, k};
        if (last_m) begin
          fold_n <= last_fold ? ZERO : fold_n + C;
          top_base <= last_fold ? 0 : top_base + {{FILL{1'b0}}, k};
          result_base <= last_fold ? 0 : result_base + {{FILL{1'b0}}, m};
        end
      end
    end
  end

  assign left_valid = stream_go;
  assign left_address = left_base + {{FILL{1'b0}}, step};
  assign left_lanes = m - fold_m;
  assign first = stream_go && step == ZERO;
  assign last = stream_end;
  assign top_valid = stream_go;
  assign top_address = top_base + {{FILL{1'b0}}, step};
  assign top_lanes = n - fold_n;

  // the drain: what it needs to know arrives ROWS cycles after the fold's last operands
  localparam ORDER = 2 + DIM_BITS + ADDRESS_BITS;
  wire [ORDER-1:0] order, arrived;
  logic [ORDER-2:0] kept;
  logic [DIM_BITS-1:0] turn;
  logic drain_busy;
  wire drain_start = arrived[ORDER-1];
  wire drain_go = drain_start || drain_busy;
  wire drain_end = drain_go && turn == R - ONE;
  wire drains_last_fold;
  wire [DIM_BITS-1:0] rows_left;
  wire [ADDRESS_BITS-1:0] drain_base;
  assign order = {stream_end, last_fold, m - fold_m, result_base + {{FILL{1'b0}}, fold_m}};
  assign {drains_last_fold, rows_left, drain_base} = drain_start ? arrived[ORDER-2:0] : kept;
  wire [DIM_BITS-1:0] drain_row = R - ONE - turn;

  delay #(
      .BITS (ORDER),
      .DEPTH(ROWS)
  ) until_complete (
      .clk  (clk),
      .reset(reset),
      .in   (order),
      .out  (arrived)
  );

  always_ff @(posedge clk) begin
    if (reset) begin
      turn <= ZERO;
      drain_busy <= 1'b0;
    end else begin
      drain_busy <= drain_go && !drain_end;
      if (drain_go) turn <= drain_end ? ZERO : turn + ONE;
    end
    if (drain_start) kept <= arrived[ORDER-2:0];
  end

  genvar r;
  generate
    for (r = 0; r < ROWS; r = r + 1) begin : row
      localparam [DIM_BITS-1:0] ROW = r[DIM_BITS-1:0];
      assign shift[r] = drain_go && turn < ROW;  // the rows above have nothing left of this fold
    end
  endgenerate

  assign result_valid = drain_go && drain_row < rows_left;
  assign result_address = drain_base + {{FILL{1'b0}}, drain_row};
  assign result_accumulate = 1'b0;
  assign result_ends_fold = drain_end;
  assign result_ends_all = drain_end && drains_last_fold;
endmodule
