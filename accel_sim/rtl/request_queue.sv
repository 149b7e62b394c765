// Requests in the order in which they arose, each with the cycle in which it did. The head is there in the cycle after
// its push. Whoever pushes sees to it that no more than 2 ** INDEX_BITS requests wait.
module request_queue #(
    parameter BITS = 32,
    parameter STAMP_BITS = 32,
    parameter INDEX_BITS = 3
) (
    input  logic                  clk,
    input  logic                  reset,
    input  logic                  push,
    input  logic [      BITS-1:0] pushed,
    input  logic [STAMP_BITS-1:0] pushed_stamp,
    input  logic                  take,
    output logic                  valid,
    output logic [      BITS-1:0] head,
    output logic [STAMP_BITS-1:0] head_stamp
);
  logic [BITS+STAMP_BITS-1:0] entries[0:(1<<INDEX_BITS)-1];
  logic [INDEX_BITS:0] begun, ended;  // one bit more than an index: full is not empty
  assign valid = begun != ended;
  assign {head, head_stamp} = entries[begun[INDEX_BITS-1:0]];
  always_ff @(posedge clk) begin
    if (push) entries[ended[INDEX_BITS-1:0]] <= {pushed, pushed_stamp};
    if (reset) begin
      begun <= 0;
      ended <= 0;
    end else begin
      if (push) ended <= ended + 1'b1;
      if (take) begun <= begun + 1'b1;
    end
  end
endmodule
